// The lab's stand-in for LiveKit's egress, which cannot be had where the tests run: upstream
// publishes an image only. It speaks the same protocol over Redis, takes the same configuration,
// and has the same processes, folders, signals, ports and metrics. It records rooms without video,
// participants and tracks; it has no Chrome.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"

	"github.com/livekit/protocol/logger"
	"github.com/livekit/protocol/redis"
	"github.com/livekit/protocol/rpc"
	"github.com/livekit/protocol/utils/guid"
	"github.com/livekit/psrpc"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

const temporary = "/home/egress/tmp"

func main() {
	var err error
	if len(os.Args) == 2 && os.Args[1] == "run-handler" {
		err = runHandler()
	} else {
		err = runService()
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func runService() error {
	body := os.Getenv("EGRESS_CONFIG_BODY")
	if file := os.Getenv("EGRESS_CONFIG_FILE"); body == "" && file != "" {
		content, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		body = string(content)
	}
	if body == "" {
		return errors.New("missing config")
	}
	conf, err := readConfig(body)
	if err != nil {
		return fmt.Errorf("could not parse config: %w", err)
	}
	node := guid.New("NE_")
	rpc.InitPSRPCStats(prometheus.Labels{"node_id": node, "node_type": "EGRESS"})
	logger.InitFromConfig(conf.Logging, "egress")

	client, err := redis.GetRedisClient(conf.Redis)
	if err != nil {
		return err
	}
	s, err := newService(conf, node, psrpc.NewRedisMessageBus(client)) // without Redis: a panic
	if err != nil {
		return err
	}
	if conf.PrometheusPort != 0 {
		listener, err := net.Listen("tcp", fmt.Sprintf(":%d", conf.PrometheusPort))
		if err != nil {
			return err
		}
		go func() { _ = http.Serve(listener, promhttp.Handler()) }()
	}
	if conf.HealthPort != 0 { // where the port is taken, nobody is told
		go func() { _ = http.ListenAndServe(fmt.Sprintf(":%d", conf.HealthPort), s) }()
	}
	page := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "The stand-in has no Chrome to show a template in.")
	})
	go func() { _ = http.ListenAndServe(fmt.Sprintf("localhost:%d", conf.TemplatePort), page) }()

	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGINT)
	go func() {
		received := <-signals
		logger.Infow("exit requested, finishing recordings", "signal", received)
		s.drain(true, received == syscall.SIGINT)
	}()
	return s.run(context.Background())
}
