package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/at-wat/ebml-go/webm"
	"github.com/livekit/protocol/livekit"
	sdk "github.com/livekit/server-sdk-go/v2"
	"github.com/pion/rtp"
	"github.com/pion/rtp/codecs"
	"github.com/pion/webrtc/v4"
	pion "github.com/pion/webrtc/v4/pkg/media"
	"github.com/pion/webrtc/v4/pkg/media/oggwriter"
	"github.com/pion/webrtc/v4/pkg/media/samplebuilder"
)

// What is received, and how it gets into the file.
type media struct {
	folder string
	failed chan<- error

	mu     sync.Mutex
	inputs []*input
	file   string
	zero   time.Time                  // the beginning of the recording
	late   func(*input) (sink, error) // for tracks that come while it runs; nil: they are left out
	finish func() error
}

type input struct {
	publication *sdk.RemoteTrackPublication
	who         *sdk.RemoteParticipant
	rate        uint32 // RTP timestamps a second
	out         sink
	first       uint32        // RTP timestamp of the first sample that was written
	offset      time.Duration // of that one in the recording
	started     bool
}

// Takes what one track brings; at is the time in the recording.
type sink interface {
	write(sample *pion.Sample, at time.Duration, key bool) error
	io.Closer
}

func newMedia(folder string, failed chan<- error) *media {
	return &media{folder: folder, failed: failed, finish: func() error { return nil }}
}

// Receive a track until it ends.
func (m *media) receive(
	track *webrtc.TrackRemote, publication *sdk.RemoteTrackPublication, who *sdk.RemoteParticipant,
) {
	var parser rtp.Depacketizer
	video := false
	switch mime := track.Codec().MimeType; {
	case strings.EqualFold(mime, webrtc.MimeTypeOpus):
		parser = &codecs.OpusPacket{}
	case strings.EqualFold(mime, webrtc.MimeTypeVP8):
		parser, video = &codecs.VP8Packet{}, true
	default:
		m.fail(fmt.Errorf("%s: %w", mime, errNotInStandIn))
		return
	}
	in := &input{publication: publication, who: who, rate: track.Codec().ClockRate}
	samples := samplebuilder.New(200, parser, in.rate)
	known, key := false, !video
	var asked time.Time
	for {
		packet, _, err := track.ReadRTP()
		if err != nil {
			return
		}
		if !known {
			known = true
			m.add(in)
		}
		samples.Push(packet)
		for sample := samples.Pop(); sample != nil; sample = samples.Pop() {
			own := !video || len(sample.Data) > 0 && sample.Data[0]&1 == 0 // RFC 6386, 9.1
			key = m.write(in, sample, own, key)
		}
		if !key && time.Since(asked) > 500*time.Millisecond {
			asked = time.Now()
			who.WritePLI(track.SSRC())
		}
	}
}

func (m *media) fail(err error) {
	select {
	case m.failed <- err:
	default: // the first ones are enough
	}
}

func (m *media) add(in *input) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.inputs = append(m.inputs, in)
	if m.late != nil {
		var err error
		if in.out, err = m.late(in); err != nil {
			m.fail(err)
		}
	}
}

// Write a sample, if the recording has begun and a whole picture came before; whether one has.
func (m *media) write(in *input, sample *pion.Sample, own, key bool) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if in.out == nil {
		return in.rate == 48000 // video waits for its next whole picture
	}
	if !key && !own {
		return false
	}
	if !in.started {
		in.started = true
		in.first, in.offset = sample.PacketTimestamp, time.Since(m.zero)
	}
	passed := time.Duration(int32(sample.PacketTimestamp-in.first)) * time.Second
	if err := in.out.write(sample, in.offset+passed/time.Duration(in.rate), own); err != nil {
		m.fail(err)
	}
	return true
}

func (m *media) tracks() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.inputs)
}

func (m *media) begun() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.file != ""
}

// The type and source of the only track, who publishes it, and the file type that fits it.
func (m *media) describe() (kind, source, who, suffix string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	in := m.inputs[0]
	suffix = ".ogg"
	if in.publication.Kind() == sdk.TrackKindVideo {
		suffix = ".webm"
	}
	source = strings.ToLower(livekit.TrackSource_name[int32(in.publication.Source())])
	return string(in.publication.Kind()), source, in.who.Identity(), suffix
}

// Record the only track, which is audio, as it comes.
func (m *media) copy(file string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.file, m.zero = file, time.Now()
	var err error
	m.inputs[0].out, err = newOgg(file)
	return err
}

// Bring all tracks that are there into one file while they come; WebM has them as they are.
func (m *media) encode(file string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.file, m.zero = file, time.Now()
	options := []string{"-f", "matroska", "-i", "pipe:0"}
	if filepath.Ext(file) != ".webm" {
		options = append(options, "-af", "aresample=async=1000:first_pts=0")
	}
	command, words := ffmpeg(append(options, file)...)
	into, err := command.StdinPipe()
	if err != nil {
		return err
	}
	if err = command.Start(); err != nil {
		return err
	}
	m.finish = func() error { return said(command.Wait(), words) }
	return matroska(into, m.inputs)
}

// Keep each audio track, also those that come later, and mix them at the end.
func (m *media) mix(file string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.file, m.zero = file, time.Now()
	m.late = func(in *input) (sink, error) { return newOgg(m.part(in)) }
	for _, in := range m.inputs {
		var err error
		if in.out, err = m.late(in); err != nil {
			return err
		}
	}
	m.finish = func() error {
		var options []string
		filters, outputs := "", ""
		count := 0
		for _, in := range m.inputs {
			if !in.started {
				continue
			}
			options = append(options, "-i", m.part(in))
			filters += fmt.Sprintf("[%d]aresample=async=1000:first_pts=0,adelay=%d:all=1[a%d];",
				count, in.offset.Milliseconds(), count)
			outputs += fmt.Sprintf("[a%d]", count)
			count++
		}
		filters += fmt.Sprintf("%samix=inputs=%d:normalize=0", outputs, count)
		command, words := ffmpeg(append(options, "-filter_complex", filters, file)...)
		return said(command.Run(), words)
	}
	return nil
}

func (m *media) part(in *input) string {
	return filepath.Join(m.folder, in.publication.SID()+".ogg")
}

// Complete what was written.
func (m *media) close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var err error
	for _, in := range m.inputs {
		if in.out != nil {
			err = errors.Join(err, in.out.Close())
			in.out = nil
		}
	}
	m.late = nil
	return errors.Join(err, m.finish())
}

func ffmpeg(options ...string) (*exec.Cmd, *bytes.Buffer) {
	file := options[len(options)-1]
	codec := []string{"-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-c:a", "aac"}
	switch filepath.Ext(file) {
	case ".webm":
		codec = []string{"-c", "copy"}
	case ".ogg":
		codec = []string{"-c:a", "libopus"}
	case ".mp3":
		codec = []string{"-c:a", "libmp3lame"}
	}
	options = append(append(options[:len(options)-1:len(options)-1], codec...), "-y", file)
	command := exec.Command("ffmpeg", append([]string{"-v", "error"}, options...)...)
	words := &bytes.Buffer{}
	command.Stderr = words
	// It dies with its handler: a recording whose handler was killed is not complete.
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return command, words
}

func said(err error, words *bytes.Buffer) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w: %s", err, strings.TrimSpace(words.String()))
}

// Have the inputs write one Matroska stream.
func matroska(to io.WriteCloser, inputs []*input) error {
	var entries []webm.TrackEntry
	for i, in := range inputs {
		number := uint64(i + 1)
		entry := webm.TrackEntry{TrackNumber: number, TrackUID: number}
		if in.publication.Kind() == sdk.TrackKindVideo {
			info := in.publication.TrackInfo()
			entry.TrackType, entry.CodecID = 1, "V_VP8"
			entry.Video = &webm.Video{PixelWidth: uint64(info.Width), PixelHeight: uint64(info.Height)}
		} else {
			entry.TrackType, entry.CodecID = 2, "A_OPUS"
			entry.CodecPrivate = []byte("OpusHead\x01\x02\x00\x00\x80\xbb\x00\x00\x00\x00\x00")
			entry.Audio = &webm.Audio{SamplingFrequency: 48000, Channels: 2}
		}
		entries = append(entries, entry)
	}
	writers, err := webm.NewSimpleBlockWriter(to, entries)
	if err != nil {
		return err
	}
	for i, in := range inputs {
		in.out = &block{BlockWriteCloser: writers[i]}
	}
	return nil
}

type block struct {
	webm.BlockWriteCloser
	last int64
}

func (b *block) write(sample *pion.Sample, at time.Duration, key bool) error {
	b.last = max(b.last, at.Milliseconds())
	_, err := b.Write(key, b.last, sample.Data)
	return err
}

type ogg struct {
	*oggwriter.OggWriter
	number uint16
}

func newOgg(file string) (*ogg, error) {
	writer, err := oggwriter.New(file, 48000, 2)
	return &ogg{OggWriter: writer}, err
}

func (o *ogg) write(sample *pion.Sample, _ time.Duration, _ bool) error {
	o.number++
	header := rtp.Header{SequenceNumber: o.number, Timestamp: sample.PacketTimestamp}
	return o.WriteRTP(&rtp.Packet{Header: header, Payload: sample.Data})
}
