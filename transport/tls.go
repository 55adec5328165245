package transport

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
)

// TLSConfig names the files that secure the connections between nodes. The zero value means plain TCP.
// The certificate and key are read again at each handshake, so they can be replaced while running; the CA
// file is read once.
type TLSConfig struct {
	CertFile, KeyFile string // this node's certificate, shown to dialers and, with ClientCertAuth, to listeners
	TrustedCAFile     string // CAs that certificates of peers must come from; "" = the system's
	ClientCertAuth    bool   // accept only dialers with a certificate from a trusted CA
}

// Enabled reports whether connections are secured at all.
func (c TLSConfig) Enabled() bool { return c != TLSConfig{} }

// Validate checks that the files fit together and can be read.
func (c TLSConfig) Validate() error {
	if !c.Enabled() {
		return nil
	}
	if c.CertFile == "" || c.KeyFile == "" {
		return errors.New("TLS needs both a certificate and a key file")
	}
	if c.ClientCertAuth && c.TrustedCAFile == "" {
		return errors.New("client certificate authentication needs a trusted CA file")
	}
	_, err := c.config()
	return err
}

// config returns what server and client side have in common.
func (c TLSConfig) config() (*tls.Config, error) {
	load := func() (*tls.Certificate, error) {
		cert, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("certificate %s with key %s: %w", c.CertFile, c.KeyFile, err)
		}
		return &cert, nil
	}
	if _, err := load(); err != nil {
		return nil, err
	}
	config := &tls.Config{
		MinVersion:           tls.VersionTLS12,
		GetCertificate:       func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return load() },
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() },
	}
	if c.TrustedCAFile != "" {
		pem, err := os.ReadFile(c.TrustedCAFile)
		if err != nil {
			return nil, fmt.Errorf("trusted CA file: %w", err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("trusted CA file %s holds no certificate", c.TrustedCAFile)
		}
		config.RootCAs, config.ClientCAs = pool, pool
	}
	if c.ClientCertAuth {
		config.ClientAuth = tls.RequireAndVerifyClientCert
	}
	return config, nil
}

// Listener wraps inner with TLS, or returns it as it is if c is the zero value.
func (c TLSConfig) Listener(inner net.Listener) (net.Listener, error) {
	if !c.Enabled() {
		return inner, nil
	}
	if err := c.Validate(); err != nil {
		return nil, err
	}
	config, err := c.config()
	if err != nil {
		return nil, err
	}
	return tls.NewListener(inner, config), nil
}

// Dialer returns a dial function for Config.Dial: TLS over TCP, or plain TCP if c is the zero value. The
// certificate of the listener must be valid for the host of the address.
func (c TLSConfig) Dialer() (func(ctx context.Context, addr string) (net.Conn, error), error) {
	var plain net.Dialer
	if !c.Enabled() {
		return func(ctx context.Context, addr string) (net.Conn, error) { return plain.DialContext(ctx, "tcp", addr) }, nil
	}
	if err := c.Validate(); err != nil {
		return nil, err
	}
	config, err := c.config()
	if err != nil {
		return nil, err
	}
	secure := tls.Dialer{NetDialer: &plain, Config: config}
	return func(ctx context.Context, addr string) (net.Conn, error) { return secure.DialContext(ctx, "tcp", addr) }, nil
}
