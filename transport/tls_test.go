package transport

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// authority issues certificates for 127.0.0.1 into a directory.
type authority struct {
	t    *testing.T
	dir  string
	name string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	a := &authority{t: t, dir: t.TempDir(), name: name}
	a.cert, a.key = a.issue("ca", &x509.Certificate{Subject: pkix.Name{CommonName: name}, IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	return a
}

// issue writes NAME.crt and NAME.key.
func (a *authority) issue(name string, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	a.write(name+".crt", &pem.Block{Type: "CERTIFICATE", Bytes: der})
	a.write(name+".key", &pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER})
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, key
}

func (a *authority) write(name string, b *pem.Block) {
	if err := os.WriteFile(filepath.Join(a.dir, name), pem.EncodeToMemory(b), 0o600); err != nil {
		a.t.Fatal(err)
	}
}

// files issues a certificate for a node and returns its config, which trusts the given authority.
func (a *authority) files(name string, trusts *authority) TLSConfig {
	a.issue(name, &x509.Certificate{Subject: pkix.Name{CommonName: name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}})
	return TLSConfig{CertFile: filepath.Join(a.dir, name+".crt"), KeyFile: filepath.Join(a.dir, name+".key"),
		TrustedCAFile: filepath.Join(trusts.dir, "ca.crt"), ClientCertAuth: true}
}

func secured(t *testing.T, tls TLSConfig) func(*Config) {
	return func(c *Config) {
		var err error
		if c.Listener, err = tls.Listener(c.Listener); err != nil {
			t.Fatal(err)
		}
		if c.Dial, err = tls.Dialer(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestMutualTLS(t *testing.T) {
	ours, theirs := newAuthority(t, "our CA"), newAuthority(t, "their CA")
	net := newTestNet(t, false)
	a := net.start("a", secured(t, ours.files("a", ours)))
	b := net.start("b", secured(t, ours.files("b", ours)))
	for _, x := range []*Transport{a, b} {
		x.Handle("echo", echo)
		x.HandleAsk("echo", echo)
	}
	large := make([]byte, 3*fragmentBytes)
	if out, err := a.Call(t.Context(), "b", "echo", large); err != nil || len(out) != len(large) {
		t.Fatalf("among ourselves: %v", err)
	}
	noCert, err := TLSConfig{}.Dialer()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		tweak func(*Config)
		to    string
		want  string
	}{
		// Signed by them and trusting us: the listener refuses its certificate.
		"foreign-cert": {secured(t, theirs.files("foreign", ours)), "b", "tls: "},
		// Signed by us and trusting them: it refuses the listener's certificate.
		"foreign-trust": {secured(t, ours.files("trusting", theirs)), "b", "certificate signed by unknown authority"},
		"plain":         {func(c *Config) { c.Dial = noCert }, "b", "handshake"},
	} {
		x := net.start(name, c.tweak)
		_, err := x.Call(t.Context(), c.to, "echo", nil)
		if !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
		addr, _ := net.resolve(c.to)
		if _, err := x.Ask(t.Context(), addr, "echo", nil); !errors.Is(err, ErrUnreachable) {
			t.Errorf("%s asks: %v", name, err)
		}
	}
	eventually(t, "the listener logs the refusals", func() bool {
		log := net.logs.String()
		return strings.Contains(log, "certificate signed by unknown authority") && strings.Contains(log, "first record does not look like a TLS handshake")
	})
}

// TestTLSWithoutClientCertificates: only the listener shows a certificate.
func TestTLSWithoutClientCertificates(t *testing.T) {
	ca := newAuthority(t, "CA")
	net := newTestNet(t, false)
	conf := ca.files("b", ca)
	conf.ClientCertAuth = false
	b := net.start("b", secured(t, conf))
	b.Handle("echo", echo)
	foreign := newAuthority(t, "other CA").files("a", ca)
	a := net.start("a", secured(t, foreign))
	if _, err := a.Call(t.Context(), "b", "echo", nil); err != nil {
		t.Error(err)
	}
}

// TestCertificatesAreReadAgain: replacing the files takes effect without a restart.
func TestCertificatesAreReadAgain(t *testing.T) {
	ca, next := newAuthority(t, "CA"), newAuthority(t, "next CA")
	n := newTestNet(t, false)
	conf := ca.files("b", ca)
	conf.ClientCertAuth = false
	b := n.start("b", secured(t, conf))
	b.HandleAsk("echo", echo)
	addr, _ := n.resolve("b")
	both := filepath.Join(t.TempDir(), "ca.crt")
	var bundle []byte
	for _, x := range []*authority{ca, next} {
		pem, err := os.ReadFile(filepath.Join(x.dir, "ca.crt"))
		if err != nil {
			t.Fatal(err)
		}
		bundle = append(bundle, pem...)
	}
	if err := os.WriteFile(both, bundle, 0o600); err != nil {
		t.Fatal(err)
	}
	onlyNext := ca.files("a", next)
	trustBoth := onlyNext
	trustBoth.TrustedCAFile = both
	a, strict := n.start("a", secured(t, trustBoth)), n.start("strict", secured(t, onlyNext))
	if _, err := a.Ask(t.Context(), addr, "echo", nil); err != nil {
		t.Fatal(err)
	}
	if _, err := strict.Ask(t.Context(), addr, "echo", nil); err == nil {
		t.Fatal("the old certificate is accepted by a node that trusts the next CA alone")
	}
	renewed := next.files("b", next)
	for from, to := range map[string]string{renewed.CertFile: conf.CertFile, renewed.KeyFile: conf.KeyFile} {
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	for _, x := range []*Transport{a, strict} {
		if _, err := x.Ask(t.Context(), addr, "echo", nil); err != nil {
			t.Error(err)
		}
	}
}

func TestTLSConfigIsChecked(t *testing.T) {
	ca := newAuthority(t, "CA")
	good := ca.files("a", ca)
	other := ca.files("b", ca)
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		conf TLSConfig
		want string
	}{
		"no key":            {TLSConfig{CertFile: good.CertFile}, "both a certificate and a key"},
		"no certificate":    {TLSConfig{TrustedCAFile: good.TrustedCAFile}, "both a certificate and a key"},
		"no CA for clients": {TLSConfig{CertFile: good.CertFile, KeyFile: good.KeyFile, ClientCertAuth: true}, "trusted CA file"},
		"missing file":      {TLSConfig{CertFile: "/nonexistent", KeyFile: good.KeyFile}, "/nonexistent"},
		"another's key":     {TLSConfig{CertFile: good.CertFile, KeyFile: other.KeyFile}, "private key does not match"},
		"empty CA file":     {TLSConfig{CertFile: good.CertFile, KeyFile: good.KeyFile, TrustedCAFile: empty}, "holds no certificate"},
	} {
		_, dialErr := c.conf.Dialer()
		_, listenErr := c.conf.Listener(nil)
		for _, err := range []error{c.conf.Validate(), dialErr, listenErr} {
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	if err := (TLSConfig{}).Validate(); err != nil || (TLSConfig{}).Enabled() {
		t.Errorf("the zero value: %v", err)
	}
	dial, err := TLSConfig{}.Dialer()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := dial(context.Background(), "127.0.0.1:0"); err == nil {
		t.Error("dialed port 0")
	}
}
