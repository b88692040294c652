// Prints the keys that livekit.yaml takes, one a line: dotted path and type.
//
// For a version not listed here yet (needs Go, and the module through GOPROXY):
//
//	mkdir /tmp/keys && cp tests/unit/data/livekit_keys.go /tmp/keys/main.go && cd /tmp/keys
//	go mod init keys && go get github.com/livekit/livekit-server@v1.13.5
//	go run . | sort > .../tests/unit/data/livekit-1.13.5.txt
//
// A version whose go.mod has replace directives (v1.13.1, v1.13.11) needs the same ones here.
// The types are what the server itself decodes into, read by reflection, so that keys inlined from
// other modules (rtcconfig, logger, redis, psrpc) are there too. "a[]" is a list, "a.*" a map with
// free keys, "a.#" one with numbers as keys; "duration" also takes Go's notation ("5s"); "object" is decoded by its own
// UnmarshalYAML and is not followed.

//go:build ignore

package main

import (
	"fmt"
	"reflect"
	"strings"
	"time"

	"github.com/livekit/livekit-server/pkg/config"
	"gopkg.in/yaml.v3"
)

var decoder = reflect.TypeOf((*yaml.Unmarshaler)(nil)).Elem()

func walk(path string, t reflect.Type) {
	for t.Kind() == reflect.Ptr {
		t = t.Elem()
	}
	switch {
	case t == reflect.TypeOf(time.Duration(0)):
		fmt.Println(path, "duration")
	case reflect.PointerTo(t).Implements(decoder):
		fmt.Println(path, "object", t)
	case t.Kind() == reflect.Slice:
		walk(path+"[]", t.Elem())
	case t.Kind() == reflect.Map:
		keys := ".*"
		if t.Key().Kind() != reflect.String {
			keys = ".#"
		}
		walk(path+keys, t.Elem())
	case t.Kind() == reflect.Struct:
		for i := 0; i < t.NumField(); i++ {
			field := t.Field(i)
			name, rest, _ := strings.Cut(field.Tag.Get("yaml"), ",")
			switch {
			case !field.IsExported() || name == "-":
			case strings.Contains(rest, "inline"):
				walk(path, field.Type)
			default:
				if name == "" { // yaml.v3: without a tag the name in lower case
					name = strings.ToLower(field.Name)
				}
				walk(strings.TrimPrefix(path+"."+name, "."), field.Type)
			}
		}
	default:
		fmt.Println(path, t.Kind())
	}
}

func main() { walk("", reflect.TypeOf(config.Config{})) }
