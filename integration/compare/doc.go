// Package compare holds kvd against a real etcd: the same requests must get the same answers, etcdctl must print
// the same, and cmd/compare measures both on one machine. It is a module of its own, so that kvd itself never
// depends on etcd's server. See README.md.
package compare
