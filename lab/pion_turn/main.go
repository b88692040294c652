// A TURN client that shares no code with coturn or with callready's probes: pion's, which LiveKit
// itself is built on. Reads one JSON object on standard input (credentials stay out of the process
// list), allocates, has one datagram echoed by a peer, and prints what it got as JSON.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/pion/turn/v5"
)

const patience = 5 * time.Second

type request struct {
	Server, Transport, Username, Credential, Peer string
	// For transport tls: the name to verify, and the PEM file of the authority to trust.
	ServerName, CaFile string
}

func main() {
	relayed, err := allocate()
	if err != nil {
		_ = json.NewEncoder(os.Stdout).Encode(map[string]string{"error": err.Error()})
		os.Exit(1)
	}
	_ = json.NewEncoder(os.Stdout).Encode(map[string]string{"relayed": relayed})
}

func allocate() (string, error) {
	var asked request
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		return "", err
	}
	conn, err := connect(asked)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	family := turn.RequestedAddressFamilyIPv4
	if peer, err := net.ResolveUDPAddr("udp", asked.Peer); err == nil && peer.IP.To4() == nil {
		family = turn.RequestedAddressFamilyIPv6
	}
	client, err := turn.NewClient(&turn.ClientConfig{
		TURNServerAddr: asked.Server, Conn: conn, Username: asked.Username,
		Password: asked.Credential, RequestedAddressFamily: family,
	})
	if err != nil {
		return "", err
	}
	defer client.Close()
	if err = client.Listen(); err != nil {
		return "", err
	}
	relay, err := client.Allocate()
	if err != nil {
		return "", err
	}
	defer relay.Close()
	return relay.LocalAddr().String(), echo(relay, asked.Peer)
}

func connect(asked request) (net.PacketConn, error) {
	if asked.Transport == "udp" {
		return net.ListenPacket("udp", ":0")
	}
	plain, err := net.DialTimeout("tcp", asked.Server, patience)
	if err != nil || asked.Transport == "tcp" {
		return turn.NewSTUNConn(plain), err
	}
	pem, err := os.ReadFile(asked.CaFile)
	if err != nil {
		return nil, err
	}
	trusted := x509.NewCertPool()
	trusted.AppendCertsFromPEM(pem)
	secure := tls.Client(plain, &tls.Config{ServerName: asked.ServerName, RootCAs: trusted})
	return turn.NewSTUNConn(secure), secure.Handshake()
}

func echo(relay net.PacketConn, peer string) error {
	to, err := net.ResolveUDPAddr("udp", peer)
	if err != nil {
		return err
	}
	if _, err = relay.WriteTo([]byte("callready"), to); err != nil {
		return err
	}
	if err = relay.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	data := make([]byte, 1500)
	n, from, err := relay.ReadFrom(data)
	if err == nil && (string(data[:n]) != "callready" || from.String() != to.String()) {
		err = fmt.Errorf("%q came back from %s", data[:n], from)
	}
	return err
}
