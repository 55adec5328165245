package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc/connectivity"

	"kvd/node"
)

// clientOptions are the flags of every command that talks to a server.
type clientOptions struct {
	endpoints      []string
	writeOut       string
	hex            bool
	dialTimeout    time.Duration
	commandTimeout time.Duration
	keepAlive      time.Duration
	keepAliveLimit time.Duration
	secure         clientv3.SecureConfig

	commandTimeoutGiven bool
}

// AddFlags adds the flags to root and, by inheritance, to all commands.
func (o *clientOptions) AddFlags(root *cobra.Command) {
	f := root.PersistentFlags()
	f.StringSliceVar(&o.endpoints, "endpoints", []string{"127.0.0.1:2379"}, "client addresses of the nodes to talk to")
	f.StringVarP(&o.writeOut, "write-out", "w", formatSimple, "output format: simple, json or table")
	f.BoolVar(&o.hex, "hex", false, "print keys and values as hexadecimal escapes in simple and table output")
	f.DurationVar(&o.dialTimeout, "dial-timeout", 2*time.Second, "longest wait for a connection")
	f.DurationVar(&o.commandTimeout, "command-timeout", 5*time.Second, "longest wait for an answer")
	f.DurationVar(&o.keepAlive, "keepalive-time", 2*time.Second, "idle time after which a connection is probed (10s at least)")
	f.DurationVar(&o.keepAliveLimit, "keepalive-timeout", 6*time.Second, "time after which a probed connection without an answer is given up")
	f.BoolVar(&o.secure.InsecureTransport, "insecure-transport", true, "talk plain text where no TLS flag and no https:// asks for TLS")
	f.BoolVar(&o.secure.InsecureSkipVerify, "insecure-skip-tls-verify", false, "accept any server certificate (for tests only)")
	f.StringVar(&o.secure.Cacert, "cacert", "", "file of the CA certificates that servers must have")
	f.StringVar(&o.secure.Cert, "cert", "", "file of this client's certificate")
	f.StringVar(&o.secure.Key, "key", "", "file of this client's key")
	if err := root.RegisterFlagCompletionFunc("write-out", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err)
	}
}

// complete takes from the environment what the command line has not set, and checks it.
func (o *clientOptions) complete(cmd *cobra.Command) error {
	if err := setFromEnv(cmd.Root().PersistentFlags(), os.Getenv); err != nil {
		return err
	}
	o.commandTimeoutGiven = cmd.Root().PersistentFlags().Changed("command-timeout")
	switch {
	case !slices.Contains(formats, o.writeOut):
		return usagef("--write-out: %q is not a format: use simple, json or table", o.writeOut)
	case len(o.endpoints) == 0 || slices.Contains(o.endpoints, ""):
		return usagef("--endpoints: an address is empty: want host:port,host:port")
	case (o.secure.Cert == "") != (o.secure.Key == ""):
		return usagef("--cert and --key go together: give both or none")
	case o.dialTimeout <= 0 || o.commandTimeout <= 0:
		return usagef("--dial-timeout and --command-timeout must be above 0")
	}
	for _, endpoint := range o.endpoints {
		if _, _, err := net.SplitHostPort(hostPort(endpoint)); err != nil {
			return usagef("--endpoints: %q is not host:port", endpoint)
		}
	}
	return nil
}

// config is for a client of these endpoints.
func (o *clientOptions) config(endpoints ...string) (*clientv3.Config, error) {
	cfg, err := clientv3.NewClientConfig(&clientv3.ConfigSpec{
		Endpoints: endpoints, DialTimeout: o.dialTimeout, Secure: &o.secure,
		KeepAliveTime: o.keepAlive, KeepAliveTimeout: o.keepAliveLimit,
	}, zap.NewNop())
	if err != nil {
		return nil, usagef("TLS flags: %v", err)
	}
	cfg.Logger = zap.NewNop()
	cfg.MaxCallSendMsgSize = node.MaxMaxRequestBytes + 1<<20 // it is for the server to refuse what is too long
	return cfg, nil
}

// connect returns a client that has a connection to one of the endpoints; all of --endpoints if none is given.
func (o *clientOptions) connect(ctx context.Context, endpoints ...string) (*clientv3.Client, error) {
	if len(endpoints) == 0 {
		endpoints = o.endpoints
	}
	cfg, err := o.config(endpoints...)
	if err != nil {
		return nil, err
	}
	client, err := clientv3.New(*cfg)
	if err != nil {
		return nil, err
	}
	dialCtx, cancel := context.WithTimeout(ctx, o.dialTimeout)
	defer cancel()
	conn := client.ActiveConnection()
	conn.Connect()
	for state := conn.GetState(); state != connectivity.Ready; state = conn.GetState() {
		if conn.WaitForStateChange(dialCtx, state) {
			continue
		}
		client.Close()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, o.diagnose(ctx, endpoints)
	}
	return client, nil
}

// connectOne is connect for looking at one endpoint: one that refuses connections is not waited for.
func (o *clientOptions) connectOne(ctx context.Context, endpoint string) (*clientv3.Client, error) {
	if conn, err := dialTCP(ctx, endpoint); err == nil {
		conn.Close()
	} else if errors.Is(err, syscall.ECONNREFUSED) {
		return nil, errors.New(reason(err))
	}
	client, err := o.connect(ctx, endpoint)
	if err != nil && ctx.Err() == nil {
		return nil, errors.New(o.probe(ctx, endpoint))
	}
	return client, err
}

// call connects and runs one request within --command-timeout.
func (o *clientOptions) call(ctx context.Context, request func(context.Context, *clientv3.Client) error) error {
	client, err := o.connect(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, o.commandTimeout)
	defer cancel()
	return request(ctx, client)
}

// do runs one operation of the key-value API.
func (o *clientOptions) do(ctx context.Context, op clientv3.Op) (resp clientv3.OpResponse, err error) {
	err = o.call(ctx, func(ctx context.Context, client *clientv3.Client) error {
		resp, err = client.Do(ctx, op)
		return err
	})
	return resp, err
}

// diagnose finds out why none of the endpoints could be connected to. The error is an errUnreachable.
func (o *clientOptions) diagnose(ctx context.Context, endpoints []string) error {
	reasons := make([]string, len(endpoints))
	var all sync.WaitGroup
	for i, endpoint := range endpoints {
		all.Go(func() { reasons[i] = endpoint + " " + o.probe(ctx, endpoint) })
	}
	all.Wait()
	return unreachable(reasons)
}

// unreachable is an errUnreachable for these endpoints, or endpoints with reasons.
func unreachable(endpoints []string) error {
	return fmt.Errorf("%w (%s): start a node with kvd start, or name others with --endpoints", errUnreachable, strings.Join(endpoints, ", "))
}

// probe says in a few words why an endpoint cannot be used.
func (o *clientOptions) probe(ctx context.Context, endpoint string) string {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	conn, err := dialTCP(ctx, endpoint)
	if err != nil {
		return reason(err)
	}
	defer conn.Close()
	cfg, err := o.config(endpoint)
	if err != nil || (cfg.TLS == nil && !strings.HasPrefix(endpoint, "https:")) {
		return "accepts connections, but does not answer: it is starting (its log says what it waits for), or it wants TLS (--cacert)"
	}
	if cfg.TLS == nil {
		cfg.TLS = new(tls.Config)
	}
	if cfg.TLS.ServerName == "" {
		cfg.TLS.ServerName, _, _ = net.SplitHostPort(hostPort(endpoint))
	}
	secure := tls.Client(conn, cfg.TLS)
	if err := secure.HandshakeContext(ctx); errors.Is(err, io.EOF) || isPlainText(err) {
		return "does not speak TLS"
	} else if err != nil {
		return reason(err)
	}
	// In TLS 1.3 a refused client certificate shows at the first read only.
	if deadline, ok := ctx.Deadline(); ok {
		secure.SetReadDeadline(deadline)
	}
	if _, err := secure.Read(make([]byte, 1)); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return reason(err)
	}
	return "does not answer"
}

func dialTCP(ctx context.Context, endpoint string) (net.Conn, error) {
	return (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", hostPort(endpoint))
}

func isPlainText(err error) bool {
	_, ok := errors.AsType[tls.RecordHeaderError](err)
	return ok
}

// reason is the innermost part of a network error: "connection refused" instead of the whole operation.
func reason(err error) string {
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Err != nil {
		err = op.Err
	}
	if call, ok := errors.AsType[*os.SyscallError](err); ok {
		err = call.Err
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) {
		return "does not answer"
	}
	return err.Error()
}

// hostPort is an endpoint without its scheme.
func hostPort(endpoint string) string {
	if u, err := url.Parse(endpoint); err == nil && u.Host != "" {
		return u.Host
	}
	return endpoint
}
