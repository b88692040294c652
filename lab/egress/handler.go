package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/livekit/protocol/egress"
	"github.com/livekit/protocol/livekit"
	"github.com/livekit/protocol/logger"
	"github.com/livekit/psrpc"
	sdk "github.com/livekit/server-sdk-go/v2"
	"github.com/pion/webrtc/v4"
	"google.golang.org/protobuf/encoding/protojson"
)

var unmarshal = protojson.UnmarshalOptions{DiscardUnknown: true}

// A handler makes one recording, in a process of its own.
type handler struct {
	conf *config
	*plan
	said   *json.Encoder // to the service
	media  *media
	room   *sdk.Room
	ending sync.Once
	ended  chan struct{}
	failed chan error

	mu     sync.Mutex // of info and of what is below
	wanted map[string]bool
}

func runHandler() error {
	conf, plan, err := handlerRequest()
	if err != nil {
		return err
	}
	logger.InitFromConfig(conf.Logging, "egress")
	sdk.SetLogger(logger.GetLogger())
	syscall.CloseOnExec(3) // the service waits until nobody has its pipe
	folder := filepath.Join(temporary, plan.info.EgressId)
	if err = os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(folder)
	h := &handler{
		conf: conf, plan: plan, said: json.NewEncoder(os.NewFile(3, "service")),
		ended: make(chan struct{}), failed: make(chan error, 10), wanted: map[string]bool{},
	}
	h.media = newMedia(folder, h.failed)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT)
	go func() {
		<-signals
		h.end(livekit.EndReasonKilled)
	}()
	go h.obey()
	if err = h.said.Encode(message{Ready: true}); err != nil {
		return err
	}
	h.record()
	return nil
}

// Do what the service says.
func (h *handler) obey() {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		switch lines.Text() {
		case "stop":
			h.end(livekit.EndReasonAPI)
		case "kill":
			h.mu.Lock()
			h.info.SetFailed(errStopping)
			h.mu.Unlock()
			h.end(livekit.EndReasonFailure)
		}
	}
}

// End the recording, once; what was recorded is written then.
func (h *handler) end(reason string) {
	h.ending.Do(func() {
		h.mu.Lock()
		h.info.SetEndReason(reason)
		if h.info.Status == livekit.EgressStatus_EGRESS_ACTIVE {
			h.info.UpdateStatus(livekit.EgressStatus_EGRESS_ENDING)
			h.tell()
		}
		h.mu.Unlock()
		close(h.ended)
	})
}

// Tell the service how it stands; the caller holds the lock.
func (h *handler) tell() {
	info, err := protojson.Marshal(h.info)
	if err == nil {
		err = h.said.Encode(message{Info: info})
	}
	if err != nil {
		logger.Errorw("the service does not listen", err)
	}
}

func (h *handler) record() {
	err := h.join()
	if err == nil {
		err = h.wait()
	}
	h.end(livekit.EndReasonFailure) // if nothing has ended it
	if h.room != nil {
		h.room.Disconnect()
	}
	stopped := time.Now().UnixNano()
	err = errors.Join(err, h.media.close())

	h.mu.Lock()
	defer h.mu.Unlock()
	active := h.file.StartedAt != 0
	if active {
		h.file.EndedAt = stopped
		h.file.Duration = h.file.EndedAt - h.file.StartedAt
		if err == nil {
			err = h.keep()
		}
	}
	switch {
	case h.info.Status == livekit.EgressStatus_EGRESS_FAILED:
	case h.info.Status == livekit.EgressStatus_EGRESS_LIMIT_REACHED:
	case err != nil:
		h.info.SetFailed(err)
	case !active:
		h.info.SetAborted(livekit.MsgStoppedBeforeStarted)
	default:
		h.info.SetComplete()
	}
	h.tell()
}

// Join the room and subscribe to what is to be recorded.
func (h *handler) join() error {
	callbacks := sdk.NewRoomCallback()
	callbacks.OnTrackPublished = func(track *sdk.RemoteTrackPublication, who *sdk.RemoteParticipant) {
		h.subscribe(track, who)
	}
	callbacks.OnTrackSubscribed = func(
		track *webrtc.TrackRemote, publication *sdk.RemoteTrackPublication, who *sdk.RemoteParticipant,
	) {
		go h.media.receive(track, publication, who)
	}
	callbacks.OnTrackUnpublished = func(track *sdk.RemoteTrackPublication, _ *sdk.RemoteParticipant) {
		h.mu.Lock()
		recorded := h.wanted[track.SID()]
		h.mu.Unlock()
		if recorded && len(h.tracks) == 1 {
			h.end(livekit.EndReasonSrcClosed)
		}
	}
	callbacks.OnParticipantDisconnected = func(who *sdk.RemoteParticipant) {
		if h.identity != "" && who.Identity() == h.identity {
			h.end(livekit.EndReasonSrcClosed)
		}
	}
	callbacks.OnDisconnectedWithReason = func(reason sdk.DisconnectionReason) {
		if reason == sdk.Failed {
			h.failed <- psrpc.NewErrorf(psrpc.Unavailable,
				"recording ended early: connection to room failed")
		}
		h.end(livekit.EndReasonSrcClosed)
	}
	var err error
	h.room, err = sdk.ConnectToRoomWithToken(
		h.wsURL, h.token, callbacks, sdk.WithAutoSubscribe(false))
	if err != nil {
		return err
	}
	for _, who := range h.room.GetRemoteParticipants() {
		for _, track := range who.TrackPublications() {
			if remote, ok := track.(*sdk.RemoteTrackPublication); ok {
				h.subscribe(remote, who)
			}
		}
	}
	return nil
}

func (h *handler) subscribe(track *sdk.RemoteTrackPublication, who *sdk.RemoteParticipant) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var wanted bool
	switch h.kind {
	case egress.EgressTypeRoomComposite:
		wanted = track.Kind() == sdk.TrackKindAudio
	case egress.EgressTypeParticipant:
		wanted = who.Identity() == h.identity && !h.media.begun()
	default:
		for _, id := range h.tracks {
			wanted = wanted || id == track.SID()
		}
	}
	if !wanted || h.wanted[track.SID()] {
		return
	}
	h.wanted[track.SID()] = true
	if err := track.SetSubscribed(true); err != nil {
		h.failed <- err
	}
}

// Begin once all tracks are there, and wait for the end.
func (h *handler) wait() error {
	var limit <-chan time.Time
	if most := h.conf.SessionLimits.FileOutputMaxDuration; most > 0 {
		limit = time.After(most)
	}
	patience := time.After(30 * time.Second)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case err := <-h.failed:
			return err
		case <-h.ended:
			select {
			case err := <-h.failed:
				return err
			default:
				return nil
			}
		case <-limit:
			h.mu.Lock()
			h.info.SetLimitReached()
			h.mu.Unlock()
			h.end(livekit.EndReasonLimitReached)
		case <-patience:
			if h.kind != egress.EgressTypeRoomComposite && !h.media.begun() {
				return psrpc.NewErrorf(psrpc.NotFound, "track %v not found", h.tracks)
			}
		case <-tick.C:
			if err := h.begin(); err != nil {
				return err
			}
		}
	}
}

// Begin to write when the media of all wanted tracks has come; the recording is ACTIVE then.
func (h *handler) begin() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	count := len(h.wanted)
	if h.kind == egress.EgressTypeRoomComposite {
		count = min(count, 1)
	}
	if h.media.begun() || count == 0 || count < len(h.tracks) || h.media.tracks() < count {
		return nil
	}
	identifier := h.info.RoomName
	replacements := map[string]string{}
	switch h.kind {
	case egress.EgressTypeParticipant:
		identifier = h.identity
		replacements["{publisher_identity}"] = h.identity
	case egress.EgressTypeTrack:
		identifier = h.tracks[0]
		kind, source, who, suffix := h.media.describe()
		replacements["{track_id}"] = h.tracks[0]
		replacements["{track_type}"] = kind
		replacements["{track_source}"] = source
		replacements["{publisher_identity}"] = who
		h.suffix = suffix
	}
	file := h.name(identifier, replacements)
	var err error
	switch {
	case h.kind == egress.EgressTypeRoomComposite:
		err = h.media.mix(file)
	case h.kind == egress.EgressTypeTrack && h.suffix == ".ogg":
		err = h.media.copy(file)
	default:
		err = h.media.encode(file)
	}
	if err != nil {
		return err
	}
	h.file.StartedAt = time.Now().UnixNano()
	h.info.UpdateStatus(livekit.EgressStatus_EGRESS_ACTIVE)
	h.tell()
	return nil
}

// Store the file and its manifest.
func (h *handler) keep() error {
	local := h.media.file
	facts, err := os.Stat(local)
	if err != nil {
		return err
	}
	k := &keeper{storage: h.storage, backup: h.conf.Backup, count: func(u *upload) {
		_ = h.said.Encode(message{Upload: u})
	}}
	h.file.Size = facts.Size()
	kind := map[string]string{".ogg": "audio/ogg", ".mp4": "video/mp4", ".mp3": "audio/mpeg",
		".webm": "video/webm"}[h.suffix]
	if h.file.Location, err = k.store(local, h.file.Filename, kind); err != nil {
		h.file.Size = 0
		return err
	}
	if k.used {
		h.info.SetBackupUsed()
	}
	if !h.manifest && !k.used {
		return nil
	}
	content := &manifest{
		EgressID: h.info.EgressId, RoomID: h.info.RoomId, RoomName: h.info.RoomName,
		StartedAt: h.info.StartedAt, EndedAt: h.file.EndedAt, Identity: h.identity,
		Files: []manifestFile{{h.file.Filename, h.file.Location}},
	}
	if h.kind == egress.EgressTypeTrack {
		content.TrackID = h.tracks[0]
	}
	name := fmt.Sprintf("%s.json", h.info.EgressId)
	file := filepath.Join(filepath.Dir(local), name)
	if err = content.write(file); err == nil {
		h.info.ManifestLocation, err = k.store(
			file, filepath.Join(filepath.Dir(h.file.Filename), name), "application/json")
	}
	if err != nil { // the recording itself is stored
		logger.Errorw("no manifest", err)
	}
	return nil
}
