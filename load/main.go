// Participants of calls, as many as a run of `make load` wants, on LiveKit's own SDK.
//
// callready/load.py starts this program and says line by line what to do; both sides speak lines of
// JSON, on standard input and output. Tokens are in them, so nothing secret is an argument.
//
//	{"addresses": […], "kind": "video", "seconds": 600}          first: what may be connected to
//	{"join": [{"url", "token", "identity", "speaks", "by"}, …], "rate": 5}
//	    {"joined": "identity", "seconds": 0.2, "path": "relay"}   of each
//	    {"failed": "identity", "why": "…"}
//	    {"done": "join"}
//	{"measure": 20, "streams": 24}
//	    {"done": "measure", "expected": 1000, …}
//
// When standard input ends, or the seconds are over, all participants leave and the program ends.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/go-logr/logr/funcr"
	"github.com/livekit/protocol/logger"
	sdk "github.com/livekit/server-sdk-go/v2"
)

// What no run may exceed, whatever it is asked for (MOST_… in callready/load.py).
const (
	mostParticipants = 2000
	mostSeconds      = 3600
)

type setup struct {
	Addresses []netip.Addr
	Kind      string
	Seconds   float64
}

type request struct {
	Join    []*caller
	Rate    float64
	Measure float64
	Streams int
}

type load struct {
	setup
	gate    *gate
	out     *json.Encoder
	writing sync.Mutex

	mu      sync.Mutex
	callers []*caller
	refused map[string]int // allocations, by the server's error
}

var refusal = regexp.MustCompile(`failed to allocate on TURN client .*\(error (\d+)`)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 16<<20)
	l := &load{out: json.NewEncoder(os.Stdout), refused: map[string]int{}}
	if !lines.Scan() {
		return fmt.Errorf("no request on standard input")
	}
	if err := json.Unmarshal(lines.Bytes(), &l.setup); err != nil {
		return fmt.Errorf("the first line is no setup")
	}
	// The SDK and pion log by this, and it is the only place that knows why an allocation failed.
	sdk.SetLogger(logger.LogRLogger(funcr.New(l.note, funcr.Options{})))
	var err error
	if l.gate, err = newGate(l.Addresses); err != nil {
		return err
	}
	// Over when standard input ends or the time has come: nobody is left in a room then, also when
	// nobody reads any more what is said.
	signal.Ignore(syscall.SIGPIPE)
	stop, _ := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	ctx, over := context.WithTimeout(stop, seconds(min(l.Seconds, mostSeconds)))
	defer over()
	requests := make(chan request)
	go func() {
		defer over()
		for lines.Scan() {
			var each request
			if json.Unmarshal(lines.Bytes(), &each) != nil {
				return
			}
			requests <- each
		}
	}()
	defer l.leave()
	for {
		select {
		case each := <-requests:
			if each.Measure > 0 {
				l.measure(ctx, each.Measure, each.Streams)
			} else {
				l.join(ctx, each.Join, each.Rate)
			}
		case <-ctx.Done():
			if ctx.Err() == context.DeadlineExceeded {
				return ctx.Err()
			}
			return nil
		}
	}
}

func (l *load) say(what map[string]any) {
	l.writing.Lock()
	defer l.writing.Unlock()
	_ = l.out.Encode(what)
}

func (l *load) note(_, words string) {
	if found := refusal.FindStringSubmatch(words); found != nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.refused[found[1]]++
	}
}

// Have participants join, so many a second at most, and wait until each has, or has not.
func (l *load) join(ctx context.Context, callers []*caller, rate float64) {
	var joining sync.WaitGroup
	next := time.Now()
	for _, each := range callers {
		l.mu.Lock()
		full := len(l.callers) >= mostParticipants
		if !full {
			l.callers = append(l.callers, each)
		}
		l.mu.Unlock()
		if full {
			l.say(map[string]any{"failed": each.Identity, "why": "there are too many participants"})
			continue
		}
		if !wait(ctx, time.Until(next)) {
			break
		}
		next = time.Now().Add(seconds(1 / max(rate, 0.1)))
		joining.Go(func() {
			if path, took, err := each.join(l.gate, l.Kind); err != nil {
				l.say(map[string]any{"failed": each.Identity, "why": err.Error()})
			} else {
				l.say(map[string]any{"joined": each.Identity, "seconds": took.Seconds(), "path": path})
			}
		})
	}
	joining.Wait()
	l.say(map[string]any{"done": "join"})
}

// Say what arrives in so many seconds, of all participants together, once there is something of as
// many streams, or there should be; what broke and was refused, since the beginning.
func (l *load) measure(ctx context.Context, span float64, wanted int) {
	l.mu.Lock()
	callers := slices.Clone(l.callers)
	l.mu.Unlock()
	var streams []*stream
	for end := time.Now().Add(patience); ; {
		streams = nil
		for _, each := range callers {
			streams = append(streams, each.heard()...)
		}
		silent := slices.ContainsFunc(streams, func(s *stream) bool { return s.now().received == 0 })
		if len(streams) >= wanted && !silent || time.Now().After(end) ||
			!wait(ctx, 50*time.Millisecond) {
			break
		}
	}
	before := make([]counts, len(streams))
	start := time.Now()
	for n, each := range streams {
		before[n] = each.now()
	}
	wait(ctx, seconds(span))
	var total counts
	heard := 0
	for n, each := range streams {
		found := each.now()
		if found.received > before[n].received {
			heard++
		}
		total.expected += found.expected - before[n].expected
		total.received += found.received - before[n].received
		total.bytes += found.bytes - before[n].bytes
	}
	took := time.Since(start).Seconds()
	broken := 0
	for _, each := range callers {
		broken += each.broken()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.say(map[string]any{
		"done": "measure", "seconds": took, "streams": heard, "expected": total.expected,
		"received": total.received, "bytes": total.bytes, "broken": broken, "refused": l.refused,
	})
}

func (l *load) leave() {
	l.mu.Lock()
	callers := slices.Clone(l.callers)
	l.mu.Unlock()
	var leaving sync.WaitGroup
	for _, each := range callers {
		leaving.Go(each.leave)
	}
	leaving.Wait()
}

// Wait, if there is time; whether there was.
func wait(ctx context.Context, span time.Duration) bool {
	select {
	case <-time.After(span):
		return true
	case <-ctx.Done():
		return false
	}
}

func seconds(number float64) time.Duration {
	return time.Duration(number * float64(time.Second))
}
