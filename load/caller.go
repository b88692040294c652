package main

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/livekit/protocol/livekit"
	sdk "github.com/livekit/server-sdk-go/v2"
	"github.com/pion/webrtc/v4"
)

// One participant.
type caller struct {
	URL, Token, Identity string
	Speaks               bool
	By                   string // the transport to a TURN server that relays all of it; empty: none

	room *sdk.Room

	mu      sync.Mutex
	streams []*stream
	breaks  int
	gone    bool
	why     error
}

// Keep the first thing that was wrong: the SDK says only that it is not connected.
func (c *caller) note(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.why == nil {
		c.why = err
	}
}

// Join and, if it speaks, publish; the kind of candidate that its media goes by, and the time until
// a path of media stood.
func (c *caller) join(g *gate, kind string) (string, time.Duration, error) {
	room := sdk.NewRoom(&sdk.RoomCallback{
		ParticipantCallback: sdk.ParticipantCallback{
			OnTrackSubscribed: func(
				track *webrtc.TrackRemote, publication *sdk.RemoteTrackPublication,
				_ *sdk.RemoteParticipant,
			) {
				if kind == "gallery" && publication.Kind() == sdk.TrackKindVideo {
					_ = publication.SetVideoQuality(livekit.VideoQuality_MEDIUM)
				}
				found := &stream{}
				c.mu.Lock()
				c.streams = append(c.streams, found)
				c.mu.Unlock()
				go found.listen(track)
			},
		},
		OnReconnecting: func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.breaks++
		},
		OnDisconnected: func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			if !c.gone {
				c.breaks++
			}
		},
	})
	policy := webrtc.ICETransportPolicyAll
	if c.By != "" {
		policy = webrtc.ICETransportPolicyRelay
	}
	start := time.Now()
	joining, joined := context.WithCancel(context.Background())
	answer := make(chan time.Duration, 1)
	go func() { answer <- answered(joining, room.LocalParticipant, start) }()
	err := room.JoinWithContextAndToken(context.Background(), g.open(c), c.Token,
		sdk.WithICETransportPolicy(policy), sdk.WithConnectTimeout(patience),
		sdk.WithDisableRegionDiscovery())
	joined()
	took := <-answer
	if err != nil {
		return "", took, errors.Join(err, c.reason())
	}
	c.mu.Lock()
	c.room = room
	c.mu.Unlock()
	if c.Speaks {
		if err = c.publish(room.LocalParticipant, kind); err != nil {
			return "", took, errors.Join(err, c.reason())
		}
	}
	return path(room.LocalParticipant.GetSubscriberPeerConnection()), took, nil
}

// The time until a path of media has answered. The SDK is connected when LiveKit has chosen one, for
// which LiveKit lets 2 s pass where it is relayed (relay_acceptance_min_wait); browsers and phones use
// the first that answers.
func answered(
	joining context.Context, participant *sdk.LocalParticipant, start time.Time,
) time.Duration {
	for wait(joining, 2*time.Millisecond) {
		connection := participant.GetSubscriberPeerConnection()
		if connection == nil {
			continue
		}
		for _, each := range connection.GetStats() {
			pair, is := each.(webrtc.ICECandidatePairStats)
			if is && pair.State == webrtc.StatsICECandidatePairStateSucceeded {
				return time.Since(start)
			}
		}
	}
	return time.Since(start)
}

func (c *caller) reason() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.why
}

func (c *caller) publish(participant *sdk.LocalParticipant, kind string) error {
	voice, err := newVoice()
	if err != nil {
		return err
	}
	if _, err = participant.PublishTrack(voice, &sdk.TrackPublicationOptions{}); err != nil || kind == "audio" {
		return err
	}
	layers, err := newVideo(c.Identity)
	if err != nil {
		return err
	}
	_, err = participant.PublishSimulcastTrack(layers, &sdk.TrackPublicationOptions{})
	return err
}

// The type of the local candidate that media goes by: host, srflx, prflx or relay.
func path(connection *webrtc.PeerConnection) string {
	if connection == nil || connection.SCTP() == nil {
		return ""
	}
	pair, err := connection.SCTP().Transport().ICETransport().GetSelectedCandidatePair()
	if err != nil || pair == nil {
		return ""
	}
	return pair.Local.Typ.String()
}

func (c *caller) heard() []*stream {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.streams[:len(c.streams):len(c.streams)]
}

// How often its connection was lost.
func (c *caller) broken() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.breaks
}

// Leave and wait until its connections are closed: TURN servers are told then.
func (c *caller) leave() {
	c.mu.Lock()
	c.gone = true
	room := c.room
	c.mu.Unlock()
	if room == nil {
		return
	}
	open := []*webrtc.PeerConnection{
		room.LocalParticipant.GetPublisherPeerConnection(),
		room.LocalParticipant.GetSubscriberPeerConnection(),
	}
	room.Disconnect()
	end := time.Now().Add(patience)
	for _, each := range open {
		for each != nil && each.ConnectionState() != webrtc.PeerConnectionStateClosed &&
			time.Now().Before(end) {
			time.Sleep(20 * time.Millisecond)
		}
	}
}
