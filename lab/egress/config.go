package main

import (
	"os"
	"time"

	"github.com/livekit/protocol/logger"
	"github.com/livekit/protocol/redis"
	"gopkg.in/yaml.v3"
)

// The keys of upstream's configuration file; those that a stand-in has no use for are `any`.
// As upstream, it takes unknown keys without a word.
type config struct {
	Redis     *redis.RedisConfig `yaml:"redis"`
	APIKey    string             `yaml:"api_key"`
	APISecret string             `yaml:"api_secret"`
	WsURL     string             `yaml:"ws_url"`

	Logging               *logger.Config `yaml:"logging"`
	TemplateBase          string         `yaml:"template_base"`
	ClusterID             string         `yaml:"cluster_id"`
	EnableChromeSandbox   bool           `yaml:"enable_chrome_sandbox"`
	MaxUploadQueue        int            `yaml:"max_upload_queue"`
	DisallowLocalStorage  bool           `yaml:"disallow_local_storage"`
	IOCreateTimeout       time.Duration  `yaml:"io_create_timeout"`
	IOUpdateTimeout       time.Duration  `yaml:"io_update_timeout"`
	IOSelectionTimeout    time.Duration  `yaml:"io_selection_timeout"`
	IOWorkers             int            `yaml:"io_workers"`
	SessionLimits         limits         `yaml:"session_limits"`
	Storage               *storage       `yaml:"storage"`
	Backup                *storage       `yaml:"backup"`
	AssumeRoleKey         string         `yaml:"s3_assume_role_key"`
	AssumeRoleSecret      string         `yaml:"s3_assume_role_secret"`
	AssumeRoleARN         string         `yaml:"s3_assume_role_arn"`
	AssumeRoleExternalID  string         `yaml:"s3_assume_role_external_id"`
	Insecure              bool           `yaml:"insecure"`
	Debug                 any            `yaml:"debug"`
	ChromeFlags           map[string]any `yaml:"chrome_flags"`
	Latency               any            `yaml:"latency"`
	LatencyOverrides      any            `yaml:"latency_overrides"`
	VideoEncoderThreads   uint           `yaml:"video_encoder_threads"`
	OneShotSenderReport   bool           `yaml:"enable_one_shot_sender_report_sync"`
	EnableSyncEngine      bool           `yaml:"enable_sync_engine"`
	AudioTempoController  any            `yaml:"audio_tempo_controller"`
	TestOverrides         any            `yaml:"test_overrides"`
	HealthPort            int            `yaml:"health_port"`
	TemplatePort          int            `yaml:"template_port"`
	PrometheusPort        int            `yaml:"prometheus_port"`
	DebugHandlerPort      int            `yaml:"debug_handler_port"`
	PulseSinkReapGraceSec int            `yaml:"pulse_sink_reap_grace_sec"`
	CPUCost               costs          `yaml:"cpu_cost"`
}

type limits struct {
	FileOutputMaxDuration    time.Duration `yaml:"file_output_max_duration"`
	FileOutputMaxSize        int64         `yaml:"file_output_max_size"`
	StreamOutputMaxDuration  time.Duration `yaml:"stream_output_max_duration"`
	SegmentOutputMaxDuration time.Duration `yaml:"segment_output_max_duration"`
	ImageOutputMaxDuration   time.Duration `yaml:"image_output_max_duration"`
}

type costs struct {
	MaxCPUUtilization           float64 `yaml:"max_cpu_utilization"`
	MaxMemory                   float64 `yaml:"max_memory"`
	MemoryCost                  float64 `yaml:"memory_cost"`
	RoomComposite               float64 `yaml:"room_composite_cpu_cost"`
	AudioRoomComposite          float64 `yaml:"audio_room_composite_cpu_cost"`
	SDKAudioRoomComposite       float64 `yaml:"sdk_audio_room_composite_cpu_cost"`
	SDKAudioRoomCompositeMemory float64 `yaml:"sdk_audio_room_composite_memory_cost"`
	Web                         float64 `yaml:"web_cpu_cost"`
	AudioWeb                    float64 `yaml:"audio_web_cpu_cost"`
	Participant                 float64 `yaml:"participant_cpu_cost"`
	TrackComposite              float64 `yaml:"track_composite_cpu_cost"`
	Track                       float64 `yaml:"track_cpu_cost"`
	MaxPulseClients             int     `yaml:"max_pulse_clients"`
	MemorySource                string  `yaml:"memory_source"`
	MemoryKillGraceSec          int     `yaml:"memory_kill_grace_sec"`
	CPUKillGraceSec             int     `yaml:"cpu_kill_grace_sec"`
}

type storage struct {
	Prefix               string `yaml:"prefix"`
	GeneratePresignedURL bool   `yaml:"generate_presigned_url"`
	S3                   *s3    `yaml:"s3"`
	Azure                any    `yaml:"azure"`
	GCP                  any    `yaml:"gcp"`
	AliOSS               any    `yaml:"alioss"`
}

type s3 struct {
	AccessKey            string            `yaml:"access_key"`
	Secret               string            `yaml:"secret"`
	SessionToken         string            `yaml:"session_token"`
	AssumeRoleARN        string            `yaml:"assume_role_arn"`
	AssumeRoleExternalID string            `yaml:"assume_role_external_id"`
	Region               string            `yaml:"region"`
	Endpoint             string            `yaml:"endpoint"`
	Bucket               string            `yaml:"bucket"`
	ForcePathStyle       bool              `yaml:"force_path_style"`
	ProxyConfig          any               `yaml:"proxy_config"`
	MaxRetries           int               `yaml:"max_retries"`
	MaxRetryDelay        time.Duration     `yaml:"max_retry_delay"`
	MinRetryDelay        time.Duration     `yaml:"min_retry_delay"`
	Metadata             map[string]string `yaml:"metadata"`
	Tagging              string            `yaml:"tagging"`
	ContentDisposition   string            `yaml:"content_disposition"`
}

func readConfig(body string) (*config, error) {
	c := &config{
		APIKey:    os.Getenv("LIVEKIT_API_KEY"),
		APISecret: os.Getenv("LIVEKIT_API_SECRET"),
		WsURL:     os.Getenv("LIVEKIT_WS_URL"),
		Logging:   &logger.Config{Level: "info"},
	}
	if err := yaml.Unmarshal([]byte(body), c); err != nil {
		return nil, err
	}
	cost := &c.CPUCost
	if cost.MaxCPUUtilization <= 0 || cost.MaxCPUUtilization > 1 {
		cost.MaxCPUUtilization = 0.8
	}
	otherwise(&cost.RoomComposite, 4)
	otherwise(&cost.AudioRoomComposite, 1)
	otherwise(&cost.SDKAudioRoomComposite, cost.AudioRoomComposite)
	otherwise(&cost.Web, 4)
	otherwise(&cost.AudioWeb, 1)
	otherwise(&cost.Participant, 2)
	otherwise(&cost.TrackComposite, 1)
	otherwise(&cost.Track, 0.5)
	otherwise(&cost.MaxPulseClients, 60)
	otherwise(&c.TemplatePort, 7980)
	otherwise(&c.IOCreateTimeout, 15*time.Second)
	otherwise(&c.IOUpdateTimeout, 30*time.Second)
	return c, nil
}

func otherwise[T int | float64 | time.Duration](value *T, standard T) {
	if *value <= 0 {
		*value = standard
	}
}
