// Checks a quote with Google's verifier (go-tdx-guest), as Debian packages it: verify QUOTE ROOT.pem COLLATERAL.json.
// What the verifier would fetch from Intel's service is taken from the file. It ends with 0 where the quote is good, with 1
// and a reason where it is not, and with 2 where a file cannot be read.
package main

import (
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/google/go-tdx-guest/verify"
)

// What a verifier wants beside a quote, in one object.
type collateral struct {
	PckCrlIssuerChain     string `json:"pck_crl_issuer_chain"`
	RootCaCrl             string `json:"root_ca_crl"`
	PckCrl                string `json:"pck_crl"`
	TcbInfoIssuerChain    string `json:"tcb_info_issuer_chain"`
	TcbInfo               string `json:"tcb_info"`
	TcbInfoSignature      string `json:"tcb_info_signature"`
	QeIdentityIssuerChain string `json:"qe_identity_issuer_chain"`
	QeIdentity            string `json:"qe_identity"`
	QeIdentitySignature   string `json:"qe_identity_signature"`
}

// Get answers as Intel's provisioning certification service does.
func (c *collateral) Get(address string) (map[string][]string, []byte, error) {
	chain := func(name, pem string) map[string][]string {
		return map[string][]string{name: {url.QueryEscape(pem)}}
	}
	signed := func(name, body, signature string) []byte {
		return []byte(fmt.Sprintf(`{"%s":%s,"signature":"%s"}`, name, body, signature))
	}
	switch {
	case strings.Contains(address, "/tcb?"):
		body := signed("tcbInfo", c.TcbInfo, c.TcbInfoSignature)
		return chain("Tcb-Info-Issuer-Chain", c.TcbInfoIssuerChain), body, nil
	case strings.Contains(address, "/qe/identity"):
		body := signed("enclaveIdentity", c.QeIdentity, c.QeIdentitySignature)
		return chain("Sgx-Enclave-Identity-Issuer-Chain", c.QeIdentityIssuerChain), body, nil
	case strings.Contains(address, "/pckcrl?"):
		body, err := hex.DecodeString(c.PckCrl)
		return chain("Sgx-Pck-Crl-Issuer-Chain", c.PckCrlIssuerChain), body, err
	case strings.Contains(address, "/root.crl"):
		body, err := hex.DecodeString(c.RootCaCrl)
		return nil, body, err
	}
	return nil, nil, fmt.Errorf("nothing is at %s", address)
}

func fail(code int, err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(code)
}

func main() {
	var files [3][]byte
	for at := range files {
		var err error
		if files[at], err = os.ReadFile(os.Args[at+1]); err != nil {
			fail(2, err)
		}
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(files[1]) {
		fail(2, fmt.Errorf("%s holds no certificate", os.Args[2]))
	}
	service := &collateral{}
	if err := json.Unmarshal(files[2], service); err != nil {
		fail(2, err)
	}
	options := &verify.Options{
		CheckRevocations: true,
		GetCollateral:    true,
		Getter:           service,
		Now:              time.Now(),
		TrustedRoots:     roots,
	}
	if err := verify.RawTdxQuote(files[0], options); err != nil {
		fail(1, err)
	}
}
