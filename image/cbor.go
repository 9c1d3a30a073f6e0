package image

import (
	"encoding/binary"
	"errors"
	"fmt"
	"reflect"
	"unicode/utf8"

	"github.com/fxamacker/cbor/v2"
)

// CBOR major types (RFC 8949, section 3.1).
const (
	majorBytes = 2
	majorText  = 3
	majorMap   = 5
)

// Bounds on the memory, in bytes, that the decoded metadata of one stream may
// take. They are needed beside the limit on the encoded bytes because an empty
// map is one byte long but can stand for a structure of hundreds. Honest
// records grow tenfold at most.
const (
	maxDecoded  = 1 << 30
	baseDecoded = 64 << 20
	maxGrowth   = 16
)

// decodedLimit returns the memory that n encoded bytes may take when decoded.
func decodedLimit(n uint64) uint64 { return min(baseDecoded+maxGrowth*n, maxDecoded) }

var (
	encMode = must(encOptions().EncMode())
	decMode = must(cbor.DecOptions{
		DupMapKey:          cbor.DupMapKeyEnforcedAPF,
		MaxNestedLevels:    16,
		MaxArrayElements:   1 << 20,
		MaxMapPairs:        1 << 16,
		IndefLength:        cbor.IndefLengthForbidden,
		TagsMd:             cbor.TagsForbidden,
		UTF8:               cbor.UTF8RejectInvalid,
		ByteStringToString: cbor.ByteStringToStringAllowed,
	}.DecMode())
)

func encOptions() cbor.EncOptions {
	o := cbor.CoreDetEncOptions()
	o.TagsMd = cbor.TagsForbidden
	o.NilContainers = cbor.NilContainerAsEmpty // an empty list is an empty array, never null
	return o
}

// must serves the two constant option sets above, which the tests construct.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// encode returns the deterministic encoding of a record's structure.
//
// Names from the kernel are bytes and need not be UTF-8, which a CBOR text
// string must be. A Go string that is not UTF-8 therefore becomes a byte
// string; only the major type in its first byte differs.
func encode(v any) ([]byte, error) {
	p, err := encMode.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	err = eachItem(p, func(head *byte, major byte, body []byte) {
		if major == majorText && !utf8.Valid(body) {
			*head ^= (majorText ^ majorBytes) << 5
		}
	})
	return p, err
}

// decode fills v from a payload, strictly: one item, definite lengths, no
// duplicate keys, no tags. Keys that v does not have are skipped.
func decode(p []byte, v any) error {
	if err := decMode.Unmarshal(p, v); err != nil {
		// Not wrapped: it may be io.EOF, which would pass for a good end.
		return fmt.Errorf("bad CBOR: %v", err)
	}
	return nil
}

// decodedSize returns an upper estimate of the memory a payload of the given
// type takes when decoded, from the items that are really there.
func decodedSize(t Type, p []byte) (uint64, error) {
	const perRecord, perNumber, perString = 512, 8, 32
	size := uint64(perRecord + len(p))
	err := eachItem(p, func(_ *byte, major byte, _ []byte) {
		switch major {
		case majorBytes, majorText:
			size += perString
		case majorMap:
			size += types[t].weight
		default:
			size += perNumber
		}
	})
	return size, err
}

var errItem = errors.New("bad CBOR: item runs past the end or has no definite length")

// eachItem calls visit for every data item of p in the order of the encoding,
// with the item's first byte, its major type and, for strings, its bytes. The
// items of arrays and maps simply follow their heads, so no stack is needed.
func eachItem(p []byte, visit func(head *byte, major byte, body []byte)) error {
	for len(p) > 0 {
		major := p[0] >> 5
		arg, n, ok := itemArgument(p)
		if !ok {
			return errItem
		}
		var body []byte
		if major == majorBytes || major == majorText {
			if arg > uint64(len(p)-n) {
				return errItem
			}
			body = p[n : n+int(arg)]
		}
		visit(&p[0], major, body)
		p = p[n+len(body):]
	}
	return nil
}

// itemArgument decodes an item's head: its argument and the head's length.
func itemArgument(p []byte) (arg uint64, n int, ok bool) {
	info := p[0] & 0x1f
	switch {
	case info < 24:
		return uint64(info), 1, true
	case info == 24 && len(p) >= 2:
		return uint64(p[1]), 2, true
	case info == 25 && len(p) >= 3:
		return uint64(binary.BigEndian.Uint16(p[1:])), 3, true
	case info == 26 && len(p) >= 5:
		return uint64(binary.BigEndian.Uint32(p[1:])), 5, true
	case info == 27 && len(p) >= 9:
		return binary.BigEndian.Uint64(p[1:]), 9, true
	}
	return 0, 0, false
}

// record returns v as a pointer to the structure that records of type t hold.
// Callers may pass the structure or a pointer to it.
func record(t Type, v any) (any, error) {
	want := types[t].record
	if want == nil {
		return nil, fmt.Errorf("%s is not a metadata record", t)
	}
	rv := reflect.ValueOf(v)
	switch {
	case rv.IsValid() && rv.Type() == want:
		p := reflect.New(want)
		p.Elem().Set(rv)
		return p.Interface(), nil
	case rv.IsValid() && rv.Type() == reflect.PointerTo(want) && !rv.IsNil():
		return v, nil
	}
	return nil, fmt.Errorf("a %T is no %s", v, want.Name())
}
