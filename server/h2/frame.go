package h2

import (
	"encoding/base64"
	"encoding/binary"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

const (
	frameHeaderBytes = 9
	defaultWindow    = 65535
	maxWindow        = 1<<31 - 1
	minFrameSize     = 16 << 10
)

func appendFrameHeader(b []byte, size int, kind http2.FrameType, flags http2.Flags, stream uint32) []byte {
	return binary.BigEndian.AppendUint32(append(b, byte(size>>16), byte(size>>8), byte(size), byte(kind), byte(flags)), stream)
}

func appendWindowUpdate(b []byte, stream, n uint32) []byte {
	return binary.BigEndian.AppendUint32(appendFrameHeader(b, 4, http2.FrameWindowUpdate, 0, stream), n)
}

func appendReset(b []byte, stream uint32, code http2.ErrCode) []byte {
	return binary.BigEndian.AppendUint32(appendFrameHeader(b, 4, http2.FrameRSTStream, 0, stream), uint32(code))
}

func appendPing(b []byte, ack bool, data [8]byte) []byte {
	var flags http2.Flags
	if ack {
		flags = http2.FlagPingAck
	}
	return append(appendFrameHeader(b, 8, http2.FramePing, flags, 0), data[:]...)
}

func appendGoAway(b []byte, last uint32, code http2.ErrCode, text string) []byte {
	b = appendFrameHeader(b, 8+len(text), http2.FrameGoAway, 0, 0)
	b = binary.BigEndian.AppendUint32(b, last)
	b = binary.BigEndian.AppendUint32(b, uint32(code))
	return append(b, text...)
}

func appendSettings(b []byte, settings ...http2.Setting) []byte {
	b = appendFrameHeader(b, 6*len(settings), http2.FrameSettings, 0, 0)
	for _, s := range settings {
		b = binary.BigEndian.AppendUint16(b, uint16(s.ID))
		b = binary.BigEndian.AppendUint32(b, s.Val)
	}
	return b
}

func appendSettingsAck(b []byte) []byte {
	return appendFrameHeader(b, 0, http2.FrameSettings, http2.FlagSettingsAck, 0)
}

// appendHeaders appends a block that ends the headers, in as many frames as it takes.
func appendHeaders(b []byte, stream uint32, endStream bool, block []byte, maxFrame int) []byte {
	var flags http2.Flags
	if endStream {
		flags = http2.FlagHeadersEndStream
	}
	kind := http2.FrameHeaders
	for {
		part := block[:min(len(block), maxFrame)]
		block = block[len(part):]
		if len(block) == 0 {
			flags |= http2.FlagHeadersEndHeaders
		}
		b = append(appendFrameHeader(b, len(part), kind, flags, stream), part...)
		if len(block) == 0 {
			return b
		}
		kind, flags = http2.FrameContinuation, 0
	}
}

// Header blocks are written without reference to the dynamic table of HPACK (RFC 7541) and without additions to it. So
// they can stand between the blocks of another server, which has that table for itself.
const (
	hpackStatus200   = 0x88 // indexed, 8: ":status: 200"
	hpackContentType = 31   // index of the name "content-type"
)

func appendLiteral(b []byte, name, value string) []byte {
	b = append(b, 0)
	b = appendString(b, name)
	return appendString(b, value)
}

func appendString(b []byte, s string) []byte { return append(appendInteger(b, 0, 7, len(s)), s...) }

// appendInteger appends an integer with a prefix of some bits, after the first bits of that byte.
func appendInteger(b []byte, first byte, prefix uint, n int) []byte {
	limit := 1<<prefix - 1
	if n < limit {
		return append(b, first|byte(n))
	}
	b = append(b, first|byte(limit))
	for n -= limit; n >= 128; n >>= 7 {
		b = append(b, byte(n)|0x80)
	}
	return append(b, byte(n))
}

var (
	// headerBlock begins every answer.
	headerBlock = appendString(appendInteger([]byte{hpackStatus200}, 0, 4, hpackContentType), "application/grpc")
	// trailerBlock ends the good ones.
	trailerBlock = appendLiteral(nil, "grpc-status", "0")
)

const maxStatusText = 4 << 10

// statusBlock ends the others.
func statusBlock(b []byte, err error) []byte {
	s, ok := status.FromError(err)
	if !ok {
		s = status.FromContextError(err) // as grpc-go
	}
	b = appendLiteral(b, "grpc-status", strconv.Itoa(int(s.Code())))
	message := s.Message()
	b = appendLiteral(b, "grpc-message", percentEncode(strings.ToValidUTF8(message[:min(len(message), maxStatusText)], "\uFFFD")))
	if p := s.Proto(); len(p.GetDetails()) > 0 {
		if details, err := proto.Marshal(p); err == nil && len(details) <= maxStatusText {
			b = appendLiteral(b, "grpc-status-details-bin", base64.RawStdEncoding.EncodeToString(details))
		}
	}
	return b
}

// percentEncode is how gRPC puts texts into headers.
func percentEncode(s string) string {
	const hex = "0123456789ABCDEF"
	var b []byte
	for i := range len(s) {
		plain := s[i] >= ' ' && s[i] <= '~' && s[i] != '%'
		switch {
		case plain && b != nil:
			b = append(b, s[i])
		case !plain:
			if b == nil {
				b = append(make([]byte, 0, len(s)+16), s[:i]...)
			}
			b = append(b, '%', hex[s[i]>>4], hex[s[i]&15])
		}
	}
	if b == nil {
		return s
	}
	return string(b)
}

var timeoutUnits = map[byte]time.Duration{'H': time.Hour, 'M': time.Minute, 'S': time.Second, 'm': time.Millisecond, 'u': time.Microsecond, 'n': time.Nanosecond}

// parseTimeout reads the header grpc-timeout: up to 8 digits and a unit.
func parseTimeout(s string) (time.Duration, bool) {
	if len(s) < 2 || len(s) > 9 {
		return 0, false
	}
	unit, ok := timeoutUnits[s[len(s)-1]]
	if !ok {
		return 0, false
	}
	n := time.Duration(0)
	for _, digit := range []byte(s[:len(s)-1]) {
		if digit < '0' || digit > '9' {
			return 0, false
		}
		n = 10*n + time.Duration(digit-'0')
	}
	const most = 1 << 62
	if n > most/unit {
		return most, true
	}
	return n * unit, true
}
