// Package e2e runs etcd's own tests against kvd: those that etcd keeps for servers as processes, driven by etcdctl, and
// those that it keeps for its client, with processes of kvd in the place of its embedded servers. It is a module of its
// own, so that kvd itself never depends on etcd's server. See README.md.
package e2e
