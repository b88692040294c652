package main

import (
	"context"
	"encoding/binary"
	"sync"
	"sync/atomic"
	"time"

	"github.com/livekit/protocol/livekit"
	sdk "github.com/livekit/server-sdk-go/v2"
	"github.com/pion/rtcp"
	"github.com/pion/webrtc/v4"
	"github.com/pion/webrtc/v4/pkg/media"
)

const (
	// What a packet has on the wire beside RTP: IPv4, UDP, and the tag of AES-GCM (RFC 7714).
	aroundRTP = 20 + 8 + 16
	// Bytes of sound in 20 ms: with all headers 125, which is 50 kbit/s.
	voiceSize = 65
	// dBov below the loudest (RFC 6464): somebody who speaks.
	voiceLevel = 20
	// Bytes of a picture that fill a packet of the SDK, which has 1,200 with RTP's and VP8's header.
	packetSize = 1180
)

// Sound: silence of Opus, padded to the size of speech.
type voice struct {
	sdk.BaseSampleProvider
	packet []byte
}

func newVoice() (*sdk.LocalTrack, error) {
	// RFC 6716, 3.2.5: CELT, 20 ms, mono, code 3 (0xfb); one frame and padding (0x41), so many
	// bytes of it; the frame, whose first bits are the silence flag (4.3); the padding.
	packet := make([]byte, voiceSize)
	copy(packet, []byte{0xfb, 0x41, voiceSize - 5, 0xff, 0xfe})
	track, err := sdk.NewLocalTrack(webrtc.RTPCodecCapability{
		MimeType: webrtc.MimeTypeOpus, ClockRate: 48000, Channels: 2,
	})
	if err != nil {
		return nil, err
	}
	return track, track.StartWrite(&voice{packet: packet}, nil)
}

func (v *voice) NextSample(context.Context) (media.Sample, error) {
	return media.Sample{Data: v.packet, Duration: 20 * time.Millisecond}, nil
}

func (v *voice) CurrentAudioLevel() uint8 { return voiceLevel }

// One layer of pictures: VP8 with the headers that an SFU reads, and nothing in them.
type pictures struct {
	sdk.BaseSampleProvider
	whole, delta []byte
	every        time.Duration
	wanted       atomic.Bool // a whole picture
}

// The layers of 720p that livekit-client sends: 2.0, 0.5 and 0.15 Mbit/s.
var layers = []struct {
	quality       livekit.VideoQuality
	width, height uint32
	packets, rate int // of a picture, pictures a second
}{
	{livekit.VideoQuality_LOW, 320, 180, 1, 15},
	{livekit.VideoQuality_MEDIUM, 640, 360, 2, 24},
	{livekit.VideoQuality_HIGH, 1280, 720, 8, 24},
}

func newVideo(name string) ([]*sdk.LocalTrack, error) {
	var tracks []*sdk.LocalTrack
	for _, each := range layers {
		size := each.packets * packetSize
		source := &pictures{
			whole: picture(size, each.width, each.height, true),
			delta: picture(size, each.width, each.height, false),
			every: time.Second / time.Duration(each.rate),
		}
		source.wanted.Store(true)
		layer := &livekit.VideoLayer{
			Quality: each.quality, Width: each.width, Height: each.height,
			Bitrate: uint32(8 * size * each.rate),
		}
		track, err := sdk.NewLocalTrack(
			webrtc.RTPCodecCapability{
				MimeType: webrtc.MimeTypeVP8, ClockRate: 90000,
				RTCPFeedback: []webrtc.RTCPFeedback{{Type: "nack"}, {Type: "nack", Parameter: "pli"}},
			},
			sdk.WithSimulcast(name+"-video", layer), sdk.WithRTCPHandler(source.asked))
		if err != nil {
			return nil, err
		}
		if err = track.StartWrite(source, nil); err != nil {
			return nil, err
		}
		tracks = append(tracks, track)
	}
	return tracks, nil
}

// RFC 6386, 9.1: the frame tag (is it no key frame, version 0, shown, size of the first partition),
// and of a key frame the start code and the size of the picture.
func picture(size int, width, height uint32, whole bool) []byte {
	data := make([]byte, size)
	tag := uint32(1<<4 | (size-10)<<5)
	if !whole {
		tag |= 1
	}
	data[0], data[1], data[2] = byte(tag), byte(tag>>8), byte(tag>>16)
	if whole {
		copy(data[3:], []byte{0x9d, 0x01, 0x2a})
		binary.LittleEndian.PutUint16(data[6:], uint16(width))
		binary.LittleEndian.PutUint16(data[8:], uint16(height))
	}
	return data
}

func (p *pictures) asked(packet rtcp.Packet) {
	switch packet.(type) {
	case *rtcp.PictureLossIndication, *rtcp.FullIntraRequest:
		p.wanted.Store(true)
	}
}

func (p *pictures) NextSample(context.Context) (media.Sample, error) {
	data := p.delta
	if p.wanted.Swap(false) {
		data = p.whole
	}
	return media.Sample{Data: data, Duration: p.every}, nil
}

// What arrives of one track.
type stream struct {
	mu      sync.Mutex
	counts  counts
	highest uint16
	seen    [1 << 10]uint64 // a bit for each sequence number
}

type counts struct{ expected, received, bytes uint64 }

func (s *stream) listen(track *webrtc.TrackRemote) {
	packet := make([]byte, 1500)
	for {
		size, _, err := track.Read(packet)
		if err != nil {
			return
		}
		if size >= 12 {
			s.note(binary.BigEndian.Uint16(packet[2:]), size)
		}
	}
}

// Count a packet once, whatever the order; those before it that have not come are expected.
func (s *stream) note(number uint16, size int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.counts.expected == 0 {
		s.highest = number - 1
	}
	word, bit := &s.seen[number/64], uint64(1)<<(number%64)
	if ahead := number - s.highest; ahead-1 < 1<<15 {
		for each := s.highest + 1; each != number; each++ {
			s.seen[each/64] &^= 1 << (each % 64)
		}
		s.counts.expected += uint64(ahead)
		s.highest = number
	} else if *word&bit != 0 {
		return
	}
	*word |= bit
	s.counts.received++
	s.counts.bytes += uint64(size + aroundRTP)
}

func (s *stream) now() counts {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.counts
}
