package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"sync"
	"syscall"
	"time"

	"github.com/livekit/protocol/egress"
	"github.com/livekit/protocol/livekit"
	"github.com/livekit/protocol/logger"
	"github.com/livekit/protocol/rpc"
	"github.com/livekit/protocol/utils/guid"
	"github.com/livekit/protocol/utils/hwstats"
	"github.com/livekit/psrpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

var (
	errStopping = psrpc.NewErrorf(psrpc.Unavailable, "server is shutting down")
	errNoCPU    = psrpc.NewErrorf(psrpc.Unavailable, "not enough CPU")
	errExists   = psrpc.NewErrorf(psrpc.AlreadyExists, "egress already exists")
	errNotFound = psrpc.NewErrorf(psrpc.NotFound, "egress not found")
	errNoStart  = psrpc.NewErrorf(psrpc.Internal, "handler failed to start")
)

// A service takes requests from Redis, and has a process of its own for each recording.
type service struct {
	conf    *config
	node    string
	cpus    float64
	io      rpc.IOInfoClient
	starts  rpc.EgressInternalServer
	stops   rpc.EgressHandlerServer
	metrics *metrics

	mu          sync.Mutex
	recordings  map[string]*recording
	stopping    bool // takes nothing new
	terminating bool // was told to end
	unhealthy   bool // a state cannot be reported
	stopped     chan struct{}
	idle        sync.WaitGroup
}

// A recording as the service sees it.
type recording struct {
	request  *rpc.StartEgressRequest
	info     *livekit.EgressInfo
	cost     float64
	kind     string
	launched bool           // has a handler
	commands io.WriteCloser // to it
	updates  chan *livekit.EgressInfo
	killed   bool
}

// A message from a handler to its service, one line of JSON.
type message struct {
	Ready  bool            `json:"ready,omitempty"`
	Info   json.RawMessage `json:"info,omitempty"`
	Upload *upload         `json:"upload,omitempty"`
}

func newService(conf *config, node string, bus psrpc.MessageBus) (*service, error) {
	client, err := rpc.NewIOInfoClient(bus, psrpc.WithClientSelectTimeout(conf.IOSelectionTimeout),
		rpc.WithClientObservability(logger.GetLogger()))
	if err != nil {
		return nil, err
	}
	s := &service{
		conf: conf, node: node, io: client,
		recordings: map[string]*recording{}, stopped: make(chan struct{}),
	}
	s.metrics = newMetrics(s)
	monitor, err := hwstats.NewProcMonitor(s.metrics.measured)
	if err != nil {
		return nil, err
	}
	s.cpus = monitor.NumCPU()
	cost := conf.CPUCost
	all := []float64{cost.RoomComposite, cost.AudioRoomComposite, cost.SDKAudioRoomComposite,
		cost.Web, cost.AudioWeb, cost.Participant, cost.TrackComposite, cost.Track}
	sort.Float64s(all)
	if s.cpus < all[0] {
		return nil, errors.New("not enough cpu")
	}
	if highest := all[len(all)-1]; s.cpus < highest {
		logger.Errorw("not enough cpu for some egress types", nil, "minimumCpu", highest, "available", s.cpus)
	}
	if err = os.MkdirAll(filepath.Join(temporary, node), 0o755); err != nil {
		return nil, err
	}
	if s.starts, err = rpc.NewEgressInternalServer(s, bus); err != nil {
		return nil, err
	}
	if err = s.starts.RegisterListActiveEgressTopic(""); err != nil {
		return nil, err
	}
	s.stops, err = rpc.NewEgressHandlerServer(s, bus)
	return s, err
}

// Take requests until told to end, then wait for the recordings, however long they last.
func (s *service) run(context.Context) error {
	if err := s.starts.RegisterStartEgressTopic(s.conf.ClusterID); err != nil {
		return err
	}
	logger.Infow("service ready", "nodeID", s.node)
	<-s.stopped
	logger.Infow("draining")
	s.idle.Wait()
	s.starts.Shutdown()
	s.stops.Shutdown()
	logger.Infow("service stopped")
	return nil
}

func (s *service) drain(terminating, kill bool) {
	s.mu.Lock()
	s.terminating = s.terminating || terminating
	first := !s.stopping
	s.stopping = true
	if kill {
		for _, each := range s.recordings {
			each.killed = true
			if each.launched {
				_, _ = io.WriteString(each.commands, "kill\n")
			}
		}
	}
	s.mu.Unlock()
	if first {
		s.starts.DeregisterStartEgressTopic(s.conf.ClusterID)
		close(s.stopped)
	}
}

func (s *service) disabled() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stopping || s.unhealthy
}

// The CPUs that are free. Upstream counts what a recording uses once it runs for a while; what it
// may use is counted here to its end, so that tests know what fits.
func (s *service) available() float64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.recordings) == 0 {
		return s.cpus
	}
	free := s.cpus * s.conf.CPUCost.MaxCPUUtilization
	for _, each := range s.recordings {
		free -= each.cost
	}
	return free
}

// The cost of a request in CPUs, upstream's name of its kind, and whether it needs Chrome.
func (s *service) weigh(request *rpc.StartEgressRequest) (cost float64, kind string, chrome bool) {
	c := s.conf.CPUCost
	switch r := request.Request.(type) {
	case *rpc.StartEgressRequest_RoomComposite:
		room := r.RoomComposite
		kind = egress.EgressTypeRoomComposite
		switch {
		case !room.AudioOnly:
			return c.RoomComposite, kind, true
		case room.Layout != "" || room.CustomBaseUrl != "":
			return c.AudioRoomComposite, kind, true
		}
		return c.SDKAudioRoomComposite, kind, false
	case *rpc.StartEgressRequest_Web:
		if r.Web.AudioOnly {
			return c.AudioWeb, egress.EgressTypeWeb, true
		}
		return c.Web, egress.EgressTypeWeb, true
	case *rpc.StartEgressRequest_Participant:
		return c.Participant, egress.EgressTypeParticipant, false
	case *rpc.StartEgressRequest_TrackComposite:
		return c.TrackComposite, egress.EgressTypeTrackComposite, false
	case *rpc.StartEgressRequest_Track:
		return c.Track, egress.EgressTypeTrack, false
	}
	return 0, egress.Unknown, true
}

func (s *service) accepts(request *rpc.StartEgressRequest) bool {
	cost, _, chrome := s.weigh(request)
	if chrome {
		clients, err := pulseClients()
		if err != nil || clients+pulseClientsOfChrome > s.conf.CPUCost.MaxPulseClients {
			return false
		}
	}
	return s.available() >= cost
}

// StartEgressAffinity says how much this worker wants a request; below 0: not at all, and if no
// worker wants it the caller waits in vain.
func (s *service) StartEgressAffinity(_ context.Context, request *rpc.StartEgressRequest) float32 {
	if s.disabled() || !s.accepts(request) {
		return -1
	}
	if s.available() == s.cpus {
		return 0.5 // one that records already is preferred, so that idle ones are free for rooms
	}
	return 1
}

// StartEgress starts a recording.
func (s *service) StartEgress(
	ctx context.Context, request *rpc.StartEgressRequest,
) (*livekit.EgressInfo, error) {
	if s.disabled() {
		return nil, errStopping
	}
	if !s.accepts(request) {
		return nil, errNoCPU
	}
	plan, err := newPlan(s.conf, request)
	if err != nil {
		return nil, err
	}
	cost, kind, _ := s.weigh(request)
	each := &recording{
		request: request, info: plan.info, cost: cost, kind: kind,
		updates: make(chan *livekit.EgressInfo, 100),
	}
	s.mu.Lock()
	if s.recordings[request.EgressId] != nil {
		s.mu.Unlock()
		return nil, errExists
	}
	s.recordings[request.EgressId] = each
	s.idle.Add(1)
	s.mu.Unlock()
	logger.Infow("request received", "egressID", request.EgressId, "requestType", kind)

	_, err = s.io.CreateEgress(ctx, plan.info, psrpc.WithRequestTimeout(s.conf.IOCreateTimeout))
	if err == nil {
		err = s.launch(each)
	}
	if err != nil {
		s.forget(each)
		return nil, err
	}
	return plan.info, nil
}

// ListActiveEgress says which recordings run here.
func (s *service) ListActiveEgress(
	context.Context, *rpc.ListActiveEgressRequest,
) (*rpc.ListActiveEgressResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	answer := &rpc.ListActiveEgressResponse{}
	for id := range s.recordings {
		answer.EgressIds = append(answer.EgressIds, id)
	}
	return answer, nil
}

// StopEgress ends a recording; what is written is complete when its state says so.
func (s *service) StopEgress(
	_ context.Context, request *livekit.StopEgressRequest,
) (*livekit.EgressInfo, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	each := s.recordings[request.EgressId]
	if each == nil || !each.launched {
		return nil, errNotFound
	}
	if _, err := io.WriteString(each.commands, "stop\n"); err != nil {
		return nil, err
	}
	info := proto.Clone(each.info).(*livekit.EgressInfo)
	if info.Status == livekit.EgressStatus_EGRESS_ACTIVE {
		info.UpdateStatus(livekit.EgressStatus_EGRESS_ENDING)
	}
	return info, nil
}

// UpdateStream is for streams, which the stand-in has not.
func (s *service) UpdateStream(
	context.Context, *livekit.UpdateStreamRequest,
) (*livekit.EgressInfo, error) {
	return nil, errNotInStandIn
}

// Start the handler of a recording and wait until it is ready.
func (s *service) launch(each *recording) error {
	conf, err := handlerConfig(s.conf)
	if err != nil {
		return err
	}
	request, err := protojson.Marshal(each.request)
	if err != nil {
		return err
	}
	id := each.request.EgressId
	handler := filepath.Join(temporary, guid.New("EGH_"))
	if err = os.MkdirAll(handler, 0o755); err != nil {
		return err
	}
	reader, writer, err := os.Pipe()
	if err != nil {
		return err
	}
	command := exec.Command("egress", "run-handler")
	command.Dir = "/"
	command.Env = append(os.Environ(), "EGRESS_HANDLER_CONFIG_BODY="+conf,
		"EGRESS_HANDLER_REQUEST="+string(request))
	command.Stdout, command.Stderr = os.Stdout, os.Stderr
	command.ExtraFiles = []*os.File{writer}
	command.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	commands, err := command.StdinPipe()
	if err == nil {
		err = command.Start()
	}
	writer.Close()
	if err != nil {
		reader.Close()
		return err
	}
	s.mu.Lock()
	each.launched, each.commands = true, commands
	s.mu.Unlock()
	s.metrics.requests.WithLabelValues(each.kind).Inc()
	ready := make(chan struct{})
	heard := make(chan struct{})
	go s.listen(each, reader, ready, heard)
	go s.report(each)
	ended := make(chan error, 1)
	go func() {
		<-heard
		err := command.Wait()
		ended <- err
		s.ended(each, err)
		os.RemoveAll(handler)
	}()
	if err = s.stops.RegisterStopEgressTopic(id); err != nil {
		_ = command.Process.Kill()
		return err
	}
	select {
	case <-ready:
		return nil
	case <-ended:
	case <-time.After(10 * time.Second):
		_ = command.Process.Kill()
	}
	return errNoStart
}

// Read what a handler says until it ends.
func (s *service) listen(each *recording, reader io.ReadCloser, ready, heard chan struct{}) {
	defer close(heard)
	defer reader.Close()
	lines := bufio.NewScanner(reader)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var said message
		if err := json.Unmarshal(lines.Bytes(), &said); err != nil {
			logger.Errorw("unreadable message", err, "egressID", each.request.EgressId)
			continue
		}
		switch {
		case said.Ready:
			close(ready)
		case said.Upload != nil:
			s.metrics.uploaded(said.Upload)
		default:
			info := &livekit.EgressInfo{}
			if err := protojson.Unmarshal(said.Info, info); err == nil {
				s.update(each, info)
			}
		}
	}
}

func (s *service) update(each *recording, info *livekit.EgressInfo) {
	s.mu.Lock()
	each.info = info
	s.mu.Unlock()
	each.updates <- proto.Clone(info).(*livekit.EgressInfo)
	if info.ErrorCode == http.StatusInternalServerError {
		logger.Errorw("internal error, shutting down", errors.New(info.Error))
		s.drain(false, false)
	}
}

// Report the states of a recording in their order; while nobody takes one, nothing new starts.
func (s *service) report(each *recording) {
	defer s.idle.Done()
	for info := range each.updates {
		for wait := 250 * time.Millisecond; ; wait = min(2*wait, time.Minute) {
			_, err := s.io.UpdateEgress(context.Background(), info,
				psrpc.WithRequestTimeout(s.conf.IOUpdateTimeout))
			again := errors.Is(err, psrpc.ErrRequestTimedOut) || errors.Is(err, psrpc.ErrNoResponse)
			s.mu.Lock()
			s.unhealthy = again
			s.mu.Unlock()
			if !again {
				logger.Infow(info.Status.String(), "egressID", info.EgressId, "error", info.Error,
					"code", info.ErrorCode, "details", info.Details, "reported", err == nil)
				break
			}
			logger.Warnw("io connection unhealthy", err, "egressID", info.EgressId)
			time.Sleep(wait)
		}
	}
}

func (s *service) ended(each *recording, err error) {
	id := each.request.EgressId
	result := "completed"
	switch {
	case each.killed:
		result = "killed_shutdown"
	case err != nil:
		result = "process_error"
	}
	s.metrics.results.WithLabelValues(each.kind, result).Inc()
	s.metrics.requests.WithLabelValues(each.kind).Dec()
	if err != nil { // it said nothing of its end itself
		info := proto.Clone(each.info).(*livekit.EgressInfo)
		info.SetFailed(err)
		info.ErrorCode = http.StatusInternalServerError
		logger.Errorw("process failed", err, "egressID", id)
		each.updates <- info
	}
	s.stops.DeregisterStopEgressTopic(id)
	os.RemoveAll(filepath.Join(temporary, id))
	close(each.updates)
	s.mu.Lock()
	delete(s.recordings, id)
	s.mu.Unlock()
}

// Forget a recording that did not start.
func (s *service) forget(each *recording) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !each.launched { // otherwise its process has an end, too
		delete(s.recordings, each.request.EgressId)
		s.idle.Done()
	}
}

// The health port: always 200, as upstream's.
func (s *service) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	status := map[string]any{"CpuLoad": s.available()}
	s.mu.Lock()
	for id, each := range s.recordings {
		status[id] = each.request.Request
	}
	s.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(status)
}
