package main

import (
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/livekit/protocol/egress"
	"github.com/livekit/protocol/livekit"
	"github.com/livekit/protocol/rpc"
	"github.com/livekit/psrpc"
	"google.golang.org/protobuf/proto"
	"gopkg.in/yaml.v3"
)

var errNotInStandIn = psrpc.NewErrorf(psrpc.InvalidArgument, "not in the stand-in")

func missing(field string) error {
	return psrpc.NewErrorf(psrpc.InvalidArgument, "request has missing or invalid field: %s", field)
}

// What a request asks for.
type plan struct {
	info     *livekit.EgressInfo
	file     *livekit.FileInfo
	kind     string // upstream's name of the kind of request
	identity string // of the participant to record
	tracks   []string
	path     string // where the file goes in the storage; empty or with / at its end: make a name
	suffix   string // of the file; empty: what fits the track
	storage  *storage
	manifest bool
	wsURL    string
	token    string
}

// A file output of a request, of either type.
type fileOutput interface {
	egress.UploadRequest
	GetFilepath() string
	GetDisableManifest() bool
}

func newPlan(conf *config, request *rpc.StartEgressRequest) (*plan, error) {
	now := time.Now().UnixNano()
	p := &plan{wsURL: conf.WsURL, token: request.Token, file: &livekit.FileInfo{}}
	p.info = &livekit.EgressInfo{
		EgressId: request.EgressId, RoomId: request.RoomId, RoomName: request.RoomName,
		Status: livekit.EgressStatus_EGRESS_STARTING, StartedAt: now, UpdatedAt: now,
		SourceType: livekit.EgressSourceType_EGRESS_SOURCE_TYPE_SDK, RetryCount: request.RetryCount,
	}
	if request.EgressId == "" {
		return nil, missing("egressID")
	}
	switch r := request.Request.(type) {
	case *rpc.StartEgressRequest_RoomComposite:
		room := proto.CloneOf(r.RoomComposite)
		p.kind, p.info.RoomName = egress.EgressTypeRoomComposite, room.RoomName
		if !room.AudioOnly || room.Layout != "" || room.CustomBaseUrl != "" {
			return nil, errNotInStandIn // that is Chrome's
		}
		p.info.Request = &livekit.EgressInfo_RoomComposite{RoomComposite: room}
		p.suffix = ".ogg"
		if err := p.encoded(conf, room); err != nil {
			return nil, err
		}
	case *rpc.StartEgressRequest_Participant:
		person := proto.CloneOf(r.Participant)
		p.kind, p.info.RoomName = egress.EgressTypeParticipant, person.RoomName
		if p.identity = person.Identity; p.identity == "" {
			return nil, missing("identity")
		}
		p.info.Request = &livekit.EgressInfo_Participant{Participant: person}
		p.suffix = ".mp4"
		if err := p.encoded(conf, person); err != nil {
			return nil, err
		}
	case *rpc.StartEgressRequest_TrackComposite:
		both := proto.CloneOf(r.TrackComposite)
		p.kind, p.info.RoomName = egress.EgressTypeTrackComposite, both.RoomName
		for _, track := range []string{both.AudioTrackId, both.VideoTrackId} {
			if track != "" {
				p.tracks = append(p.tracks, track)
			}
		}
		if p.tracks == nil {
			return nil, missing("audio_track_id or video_track_id")
		}
		p.info.Request = &livekit.EgressInfo_TrackComposite{TrackComposite: both}
		p.suffix = ".mp4"
		if both.VideoTrackId == "" {
			p.suffix = ".ogg"
		}
		if err := p.encoded(conf, both); err != nil {
			return nil, err
		}
	case *rpc.StartEgressRequest_Track:
		track := proto.CloneOf(r.Track)
		p.kind, p.info.RoomName = egress.EgressTypeTrack, track.RoomName
		if p.tracks = []string{track.TrackId}; track.TrackId == "" {
			return nil, missing("track_id")
		}
		if track.GetFile() == nil {
			return nil, errNotInStandIn // a WebSocket
		}
		if err := p.output(conf, track.GetFile()); err != nil {
			return nil, err
		}
		egress.RedactDirectOutputs(track)
		p.info.Request = &livekit.EgressInfo_Track{Track: track}
	default:
		return nil, errNotInStandIn
	}
	p.info.FileResults = []*livekit.FileInfo{p.file}
	if request.WsUrl != "" {
		p.wsURL = request.WsUrl
	}
	if p.wsURL == "" {
		return nil, missing("ws_url")
	}
	if p.token == "" {
		var err error
		if conf.APIKey == "" || conf.APISecret == "" {
			return nil, missing("token or api key/secret")
		}
		p.token, err = egress.BuildEgressToken(
			request.EgressId, conf.APIKey, conf.APISecret, p.info.RoomName)
		if err != nil {
			return nil, err
		}
	}
	return p, nil
}

// Take the one file that a request for an encoded recording has, and hide its secrets.
func (p *plan) encoded(conf *config, request egress.EncodedOutput) error {
	files := request.GetFileOutputs()
	old, ok := request.(egress.EncodedOutputDeprecated)
	if ok && old.GetFile() != nil && len(files) == 0 {
		files = append(files, old.GetFile())
		p.info.Result = &livekit.EgressInfo_File{File: p.file}
	}
	others := len(request.GetStreamOutputs()) + len(request.GetSegmentOutputs()) +
		len(request.GetImageOutputs())
	if len(files) != 1 || others > 0 {
		return errNotInStandIn
	}
	switch files[0].FileType {
	case livekit.EncodedFileType_MP4:
		p.suffix = ".mp4"
	case livekit.EncodedFileType_OGG:
		p.suffix = ".ogg"
	case livekit.EncodedFileType_MP3:
		p.suffix = ".mp3"
	}
	err := p.output(conf, files[0])
	egress.RedactEncodedOutputs(request)
	return err
}

func (p *plan) output(conf *config, file fileOutput) error {
	p.path = file.GetFilepath()
	p.manifest = !file.GetDisableManifest()
	p.storage = conf.Storage
	if p.storage == nil {
		p.storage = &storage{}
	}
	if own := file.GetS3(); own != nil {
		p.storage = &storage{Prefix: p.storage.Prefix, S3: &s3{
			AccessKey: own.AccessKey, Secret: own.Secret, SessionToken: own.SessionToken,
			Region: own.Region, Endpoint: own.Endpoint, Bucket: own.Bucket,
			ForcePathStyle: own.ForcePathStyle,
		}}
	}
	if file.GetGcp() != nil || file.GetAzure() != nil || file.GetAliOSS() != nil ||
		p.storage.Azure != nil || p.storage.GCP != nil || p.storage.AliOSS != nil {
		return errNotInStandIn
	}
	if conf.DisallowLocalStorage && p.storage.S3 == nil {
		return missing("output")
	}
	return nil
}

// Give the file its name, once it is known what it holds; the name that it has while it is written.
func (p *plan) name(identifier string, replacements map[string]string) string {
	now := time.Now()
	name := strings.TrimPrefix(path.Clean("/"+p.path), "/")
	if path.IsAbs(p.path) {
		name = path.Clean(p.path)
	}
	if p.path == "" || strings.HasSuffix(p.path, "/") {
		name = path.Join(name, identifier+"-"+now.Format("2006-01-02T150405"))
	}
	milliseconds := strconv.Itoa(1000 + now.Nanosecond()/1e6)[1:]
	replacements["{room_name}"] = p.info.RoomName
	replacements["{room_id}"] = p.info.RoomId
	replacements["{time}"] = now.Format("2006-01-02T150405")
	replacements["{utc}"] = now.Format("20060102150405") + milliseconds
	for key, value := range replacements {
		name = strings.ReplaceAll(name, key, value)
	}
	switch suffix := path.Ext(name); suffix {
	case p.suffix:
	case ".mp4", ".ogg", ".webm", ".mp3":
		name = strings.TrimSuffix(name, suffix) + p.suffix
	default:
		name += p.suffix
	}
	p.file.Filename = name
	return filepath.Join(temporary, p.info.EgressId, path.Base(name))
}

func handlerConfig(conf *config) (string, error) {
	body, err := yaml.Marshal(conf)
	return string(body), err
}

func handlerRequest() (*config, *plan, error) {
	conf, err := readConfig(os.Getenv("EGRESS_HANDLER_CONFIG_BODY"))
	if err != nil {
		return nil, nil, err
	}
	request := &rpc.StartEgressRequest{}
	if err = unmarshal.Unmarshal([]byte(os.Getenv("EGRESS_HANDLER_REQUEST")), request); err != nil {
		return nil, nil, err
	}
	p, err := newPlan(conf, request)
	return conf, p, err
}
