// Shim is kvd behind etcd's name: it takes etcd's flags, turns them into kvd's and becomes kvd.
//
// ETCD_SHIM_KVD names the kvd binary, ETCD_SHIM_FLAGS has further flags of kvd, separated by spaces, and ETCD_SHIM_CERT
// and ETCD_SHIM_KEY name the certificate that stands for those that etcd makes itself (--auto-tls, --peer-auto-tls).
// They begin with ETCD_ because etcd's tests hand on no others.
package main

import (
	"fmt"
	"os"
	"strings"
	"syscall"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		os.Exit(2)
	}
}

func run() error {
	kvd := os.Getenv("ETCD_SHIM_KVD")
	if kvd == "" {
		return fmt.Errorf("ETCD_SHIM_KVD does not name a kvd binary")
	}
	args, err := translate(os.Args[1:], selfSigned{cert: os.Getenv("ETCD_SHIM_CERT"), key: os.Getenv("ETCD_SHIM_KEY")})
	if err != nil {
		return err
	}
	args = append(args, strings.Fields(os.Getenv("ETCD_SHIM_FLAGS"))...)
	return syscall.Exec(kvd, append([]string{kvd}, args...), os.Environ())
}
