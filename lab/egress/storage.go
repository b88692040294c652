package main

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/livekit/psrpc"
)

// One try to store a file, as the metrics count it.
type upload struct {
	Type         string
	Status       string // success, 4xx, 5xx or internal
	Endpoint     bool   // the storage has an address of its own
	Backup       bool
	Milliseconds float64
}

type statusError struct {
	status int
	words  string
}

func (e *statusError) Error() string { return fmt.Sprintf("%d: %s", e.status, e.words) }

// Where the files of a recording go: the storage and, after it failed once, the backup.
type keeper struct {
	storage, backup *storage
	failed          bool // the storage, once
	used            bool // the backup
	count           func(*upload)
}

// Store a local file; the place that it has then.
func (k *keeper) store(local, name, kind string) (string, error) {
	var failure error
	for _, target := range []*storage{k.storage, k.backup} {
		backup := target == k.backup
		if target == nil || (!backup && k.failed) {
			continue
		}
		began := time.Now()
		place, err := target.put(local, path.Join(target.Prefix, name))
		u := &upload{Type: kind, Status: "success", Backup: backup,
			Endpoint:     target.S3 != nil && target.S3.Endpoint != "",
			Milliseconds: float64(time.Since(began).Milliseconds())}
		var refused *statusError
		if errors.As(err, &refused) {
			u.Status = fmt.Sprintf("%dxx", refused.status/100)
		} else if err != nil {
			u.Status = "internal"
		}
		k.count(u)
		if err == nil {
			k.used = k.used || backup
			return place, nil
		}
		k.failed = k.backup != nil
		failure = errors.Join(failure, err)
	}
	return "", failure
}

func (s *storage) put(local, name string) (string, error) {
	kind, put := "Local", copyFile
	if s.S3 != nil {
		kind, put = "S3", s.S3.put
	}
	place, err := put(local, name)
	if err != nil {
		return "", psrpc.NewErrorf(psrpc.InvalidArgument, "%s upload failed: %w", kind, err)
	}
	return place, nil
}

func copyFile(local, name string) (string, error) {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return "", err
	}
	from, err := os.Open(local)
	if err != nil {
		return "", err
	}
	defer from.Close()
	to, err := os.Create(name)
	if err != nil {
		return "", err
	}
	_, err = io.Copy(to, from)
	return name, errors.Join(err, to.Close())
}

func (s *s3) put(local, name string) (string, error) {
	retries, wait, most := s.MaxRetries, s.MinRetryDelay, s.MaxRetryDelay
	otherwise(&retries, 5)
	otherwise(&wait, 100*time.Millisecond)
	otherwise(&most, 5*time.Second)
	for {
		place, err := s.once(local, name)
		var refused *statusError
		if err == nil || retries == 0 || (errors.As(err, &refused) && refused.status < 500) {
			return place, err
		}
		retries--
		time.Sleep(wait)
		wait = min(2*wait, most)
	}
}

// PutObject with an AWS Signature Version 4 of its header fields.
func (s *s3) once(local, name string) (string, error) {
	content, err := os.ReadFile(local)
	if err != nil {
		return "", err
	}
	region := s.Region
	if region == "" {
		region = "us-east-1"
	}
	endpoint := s.Endpoint
	if endpoint == "" {
		endpoint = "https://s3." + region + ".amazonaws.com"
	}
	target, err := url.Parse(endpoint)
	if err != nil {
		return "", err
	}
	name = strings.TrimPrefix(name, "/")
	if s.ForcePathStyle {
		name = s.Bucket + "/" + name
	} else {
		target.Host = s.Bucket + "." + target.Host
	}
	target.Path = path.Join("/", target.Path, name)
	request, err := http.NewRequest(http.MethodPut, target.String(), bytes.NewReader(content))
	if err != nil {
		return "", err
	}
	hash := func(data []byte) string { sum := sha256.Sum256(data); return hex.EncodeToString(sum[:]) }
	mac := func(key []byte, text string) []byte {
		m := hmac.New(sha256.New, key)
		m.Write([]byte(text))
		return m.Sum(nil)
	}
	now := time.Now().UTC().Format("20060102T150405Z")
	names := []string{"host", "x-amz-content-sha256", "x-amz-date"}
	request.Header.Set("X-Amz-Date", now)
	request.Header.Set("X-Amz-Content-Sha256", hash(content))
	if s.SessionToken != "" {
		request.Header.Set("X-Amz-Security-Token", s.SessionToken)
		names = append(names, "x-amz-security-token")
	}
	canonical := "PUT\n" + target.EscapedPath() + "\n\nhost:" + target.Host + "\n"
	for _, each := range names[1:] {
		canonical += each + ":" + request.Header.Get(each) + "\n"
	}
	signed := strings.Join(names, ";")
	canonical += "\n" + signed + "\n" + hash(content)
	scope := now[:8] + "/" + region + "/s3/aws4_request"
	key := []byte("AWS4" + s.Secret)
	for _, part := range strings.Split(scope, "/") {
		key = mac(key, part)
	}
	signature := mac(key, "AWS4-HMAC-SHA256\n"+now+"\n"+scope+"\n"+hash([]byte(canonical)))
	request.Header.Set("Authorization", fmt.Sprintf(
		"AWS4-HMAC-SHA256 Credential=%s/%s, SignedHeaders=%s, Signature=%x",
		s.AccessKey, scope, signed, signature))
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	if answer.StatusCode >= 300 {
		words, _ := io.ReadAll(io.LimitReader(answer.Body, 300))
		return "", &statusError{answer.StatusCode, string(words)}
	}
	return target.String(), nil
}

// What is stored beside a recording, under upstream's names.
type manifest struct {
	EgressID  string         `json:"egress_id,omitempty"`
	RoomID    string         `json:"room_id,omitempty"`
	RoomName  string         `json:"room_name,omitempty"`
	StartedAt int64          `json:"started_at,omitempty"`
	EndedAt   int64          `json:"ended_at,omitempty"`
	Identity  string         `json:"publisher_identity,omitempty"`
	TrackID   string         `json:"track_id,omitempty"`
	Files     []manifestFile `json:"files,omitempty"`
}

type manifestFile struct {
	Filename string `json:"filename,omitempty"`
	Location string `json:"location,omitempty"`
}

func (m *manifest) write(file string) error {
	content, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return os.WriteFile(file, content, 0o666)
}
