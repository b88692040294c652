package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"
	"github.com/livekit/protocol/livekit"
	"github.com/pion/stun/v3"
	"google.golang.org/protobuf/proto"
)

// Stands between the SDK and LiveKit, on loopback, for what the SDK has no option for: nothing is
// connected to that is not of the inventory, and a participant is told only of the TURN servers
// that it is to use.
type gate struct {
	addresses []netip.Addr
	listens   string
	dialer    websocket.Dialer

	mu      sync.Mutex
	callers map[string]*caller
	names   map[string]place // that have been looked up
}

type place struct {
	addresses []netip.Addr
	err       error
}

const patience = 10 * time.Second

func newGate(addresses []netip.Addr) (*gate, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	g := &gate{
		addresses: addresses, listens: listener.Addr().String(),
		callers: map[string]*caller{}, names: map[string]place{},
	}
	g.dialer = websocket.Dialer{NetDialContext: g.dial, HandshakeTimeout: patience}
	go func() { _ = http.Serve(listener, g) }()
	return g, nil
}

// The URL by which the SDK reaches a participant's LiveKit.
func (g *gate) open(c *caller) string {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.callers[c.Identity] = c
	return fmt.Sprintf("ws://%s/%s", g.listens, c.Identity)
}

func (g *gate) ServeHTTP(answer http.ResponseWriter, asked *http.Request) {
	identity, path, _ := strings.Cut(strings.TrimPrefix(asked.URL.Path, "/"), "/")
	g.mu.Lock()
	c := g.callers[identity]
	g.mu.Unlock()
	// The SDK asks /rtc/validate why it was not let in, which the refusal has said.
	if c == nil || !websocket.IsWebSocketUpgrade(asked) {
		http.Error(answer, "", http.StatusBadGateway)
		return
	}
	url := fmt.Sprintf("%s/%s?%s", c.URL, path, asked.URL.RawQuery)
	header := http.Header{"Authorization": asked.Header["Authorization"]}
	server, response, err := g.dialer.DialContext(asked.Context(), url, header)
	if err != nil {
		if response != nil {
			words, _ := io.ReadAll(io.LimitReader(response.Body, 200))
			err = fmt.Errorf("LiveKit answers %d %s", response.StatusCode, words)
		}
		c.note(err)
		http.Error(answer, "", http.StatusBadGateway)
		return
	}
	defer server.Close()
	upgrader := websocket.Upgrader{}
	client, err := upgrader.Upgrade(answer, asked, nil)
	if err != nil {
		return
	}
	defer client.Close()
	go func() {
		defer server.Close()
		defer client.Close()
		for {
			kind, message, err := client.ReadMessage()
			if err != nil || server.WriteMessage(kind, message) != nil {
				return
			}
		}
	}()
	for {
		_, message, err := server.ReadMessage()
		if err != nil {
			return
		}
		if message = g.passed(c, message); message == nil {
			continue
		}
		if client.WriteMessage(websocket.BinaryMessage, message) != nil {
			return
		}
	}
}

// A message of LiveKit's as the participant may have it; nil: not at all.
func (g *gate) passed(c *caller, message []byte) []byte {
	said := &livekit.SignalResponse{}
	if proto.Unmarshal(message, said) != nil {
		return nil
	}
	switch m := said.Message.(type) {
	case *livekit.SignalResponse_Join:
		m.Join.IceServers = g.servers(c, m.Join.IceServers)
		m.Join.AlternativeUrl = ""
	case *livekit.SignalResponse_Reconnect:
		m.Reconnect.IceServers = g.servers(c, m.Reconnect.IceServers)
	case *livekit.SignalResponse_Leave:
		m.Leave.Regions = nil
	case *livekit.SignalResponse_Offer:
		m.Offer.Sdp = g.session(c, m.Offer.Sdp)
	case *livekit.SignalResponse_Answer:
		m.Answer.Sdp = g.session(c, m.Answer.Sdp)
	case *livekit.SignalResponse_Trickle:
		var init struct{ Candidate string }
		if json.Unmarshal([]byte(m.Trickle.CandidateInit), &init) != nil || !g.ours(c, init.Candidate) {
			return nil
		}
	default:
		return message
	}
	changed, err := proto.Marshal(said)
	if err != nil {
		return nil
	}
	return changed
}

// Those of the ICE servers that are of the inventory, and of the transport that the participant is
// to be relayed by.
func (g *gate) servers(c *caller, offered []*livekit.ICEServer) []*livekit.ICEServer {
	var kept []*livekit.ICEServer
	for _, each := range offered {
		urls := slices.DeleteFunc(slices.Clone(each.Urls), func(url string) bool {
			uri, err := stun.ParseURI(url)
			if err == nil && c.By != "" && c.By != transport(uri) {
				return true
			}
			if err == nil {
				_, err = g.find(uri.Host)
			}
			c.note(err)
			return err != nil
		})
		if len(urls) > 0 {
			kept = append(kept, &livekit.ICEServer{
				Urls: urls, Username: each.Username, Credential: each.Credential,
			})
		}
	}
	if c.By != "" && len(kept) == 0 {
		c.note(fmt.Errorf("LiveKit hands out no TURN server of the inventory over %s", c.By))
	}
	return kept
}

// As callready/settings/pools.py calls it; empty of a STUN server.
func transport(uri *stun.URI) string {
	switch {
	case uri.Scheme == stun.SchemeTypeTURNS && uri.Proto == stun.ProtoTypeTCP:
		return "tls"
	case uri.Scheme == stun.SchemeTypeTURN && uri.Proto == stun.ProtoTypeTCP:
		return "tcp"
	case uri.Scheme == stun.SchemeTypeTURN:
		return "udp"
	}
	return ""
}

// A session description without candidates that are not of the inventory.
func (g *gate) session(c *caller, sdp string) string {
	lines := strings.SplitAfter(sdp, "\n")
	return strings.Join(slices.DeleteFunc(lines, func(line string) bool {
		candidate, is := strings.CutPrefix(line, "a=candidate")
		return is && !g.ours(c, candidate)
	}), "")
}

// Whether a candidate (RFC 8839, 5.1) is of the inventory, or says only that there are no more.
func (g *gate) ours(c *caller, candidate string) bool {
	words := strings.Fields(candidate)
	if len(words) == 0 {
		return true
	}
	if len(words) < 5 {
		return false
	}
	address, err := netip.ParseAddr(words[4]) // never a name, which only a browser knows (mDNS)
	if err == nil && !slices.Contains(g.addresses, address) {
		err = fmt.Errorf("LiveKit's candidate %s is no address of the inventory", address)
	}
	c.note(err)
	return err == nil
}

// The addresses of a name, or an error if one of them is not of the inventory.
func (g *gate) find(host string) ([]netip.Addr, error) {
	g.mu.Lock()
	known, is := g.names[host]
	g.mu.Unlock()
	if !is {
		ctx, cancel := context.WithTimeout(context.Background(), patience/2)
		defer cancel()
		found, err := net.DefaultResolver.LookupNetIP(ctx, "ip", strings.Trim(host, "[]"))
		for n, each := range found {
			found[n] = each.Unmap()
			if err == nil && !slices.Contains(g.addresses, found[n]) {
				err = fmt.Errorf("%s is %s, which is no address of the inventory", host, found[n])
			}
		}
		known = place{found, err}
		g.mu.Lock()
		g.names[host] = known
		g.mu.Unlock()
	}
	return known.addresses, known.err
}

func (g *gate) dial(ctx context.Context, network, to string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(to)
	if err != nil {
		return nil, err
	}
	found, err := g.find(host)
	if err != nil {
		return nil, err
	}
	var conn net.Conn
	for _, each := range found {
		dialer := net.Dialer{Timeout: patience / 2}
		conn, err = dialer.DialContext(ctx, network, net.JoinHostPort(each.String(), port))
		if err == nil {
			break
		}
	}
	return conn, err
}
