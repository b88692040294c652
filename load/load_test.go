package main

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/livekit/protocol/livekit"
	"google.golang.org/protobuf/proto"
)

var ours = gate{
	addresses: []netip.Addr{netip.MustParseAddr("192.0.2.11"), netip.MustParseAddr("2001:db8::11")},
	names:     map[string]place{},
}

func through(t *testing.T, c *caller, message *livekit.SignalResponse) *livekit.SignalResponse {
	t.Helper()
	data, err := proto.Marshal(message)
	if err != nil {
		t.Fatal(err)
	}
	if data = ours.passed(c, data); data == nil {
		return nil
	}
	said := &livekit.SignalResponse{}
	if err = proto.Unmarshal(data, said); err != nil {
		t.Fatal(err)
	}
	return said
}

func joined(t *testing.T, c *caller) []string {
	t.Helper()
	said := through(t, c, &livekit.SignalResponse{Message: &livekit.SignalResponse_Join{
		Join: &livekit.JoinResponse{IceServers: []*livekit.ICEServer{
			{Urls: []string{"stun:192.0.2.99:3478"}},
			{Urls: []string{
				"turn:192.0.2.11:3478?transport=udp", "turn:192.0.2.11:3478?transport=tcp",
				"turns:[2001:db8::11]:5349?transport=tcp", "turn:192.0.2.99:3478?transport=udp",
			}, Username: "name", Credential: "word"},
		}},
	}})
	var urls []string
	for _, each := range said.GetJoin().IceServers {
		if each.Username != "name" || each.Credential != "word" {
			t.Errorf("credentials are not handed on: %v", each)
		}
		urls = append(urls, each.Urls...)
	}
	return urls
}

func TestOnlyServersOfTheInventoryAreHandedOn(t *testing.T) {
	for by, wanted := range map[string][]string{
		"": {
			"turn:192.0.2.11:3478?transport=udp", "turn:192.0.2.11:3478?transport=tcp",
			"turns:[2001:db8::11]:5349?transport=tcp",
		},
		"udp": {"turn:192.0.2.11:3478?transport=udp"},
		"tcp": {"turn:192.0.2.11:3478?transport=tcp"},
		"tls": {"turns:[2001:db8::11]:5349?transport=tcp"},
	} {
		if urls := joined(t, &caller{By: by}); !slices.Equal(urls, wanted) {
			t.Errorf("by %q: %v", by, urls)
		}
	}
	c := &caller{}
	joined(t, c)
	if why := c.reason(); why == nil || !strings.Contains(why.Error(), "192.0.2.99, which is no address") {
		t.Errorf("what was left out is not said: %v", why)
	}
}

func TestOnlyCandidatesOfTheInventoryAreHandedOn(t *testing.T) {
	line := "candidate:1 1 udp 2130706431 %s 50000 typ host"
	for address, passes := range map[string]bool{
		"192.0.2.11": true, "2001:db8::11": true, "192.0.2.99": false, "a.local": false, "": false,
	} {
		candidate := strings.Replace(line, "%s", address, 1)
		said := through(t, &caller{}, &livekit.SignalResponse{Message: &livekit.SignalResponse_Trickle{
			Trickle: &livekit.TrickleRequest{CandidateInit: `{"candidate":"` + candidate + `"}`},
		}})
		if passes != (said != nil) {
			t.Errorf("%q: %v", address, said)
		}
		said = through(t, &caller{}, &livekit.SignalResponse{Message: &livekit.SignalResponse_Offer{
			Offer: &livekit.SessionDescription{Sdp: "v=0\r\na=" + candidate + "\r\na=mid:0\r\n"},
		}})
		if sdp := said.GetOffer().Sdp; passes != strings.Contains(sdp, "candidate") ||
			!strings.HasSuffix(sdp, "a=mid:0\r\n") {
			t.Errorf("%q: %q", address, sdp)
		}
	}
}

func TestNothingElseIsConnectedTo(t *testing.T) {
	if _, err := ours.dial(t.Context(), "tcp", "127.0.0.1:9"); err == nil ||
		!strings.Contains(err.Error(), "127.0.0.1, which is no address of the inventory") {
		t.Error(err)
	}
}

func TestPacketsAreCountedOnce(t *testing.T) {
	s := &stream{}
	// From 65530 over the end: 3 comes twice, 65535 late, 1 never.
	for _, number := range []uint16{65530, 65531, 65532, 65533, 65534, 0, 65535, 2, 3, 3, 4} {
		s.note(number, 100)
	}
	if s.counts.expected != 11 || s.counts.received != 10 || s.counts.bytes != 10*(100+aroundRTP) {
		t.Errorf("%+v", s.counts)
	}
	// Numbers come again, a round later.
	for number := range 1 << 17 {
		s.note(uint16(5+number), 100)
	}
	if s.counts.received != 10+1<<17 {
		t.Errorf("%+v", s.counts)
	}
}

func TestPicturesHaveTheHeadersOfVP8(t *testing.T) {
	whole, delta := picture(9440, 1280, 720, true), picture(9440, 1280, 720, false)
	if whole[0]&1 != 0 || delta[0]&1 != 1 || len(whole) != 9440 || len(delta) != 9440 {
		t.Error("key frames have an even first byte (RFC 6386, 9.1)")
	}
	if string(whole[3:10]) != "\x9d\x01\x2a\x00\x05\xd0\x02" {
		t.Errorf("% x", whole[:10])
	}
}
