package image

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"maps"
)

// PageSize is the size of a page in the stream, in bytes, and the alignment of
// raw bytes in it.
const PageSize = 4096

// Limits of the format. Each bounds what a hostile stream can make a reader
// hold, and each is far above what real containers need.
const (
	// MaxRaw is the most raw bytes a bulk record holds.
	MaxRaw = 4 << 20
	// MaxRuns is the most runs a TypePages record holds.
	MaxRuns = 4096
	// MaxRecord is the longest payload of a metadata record, in bytes.
	MaxRecord = 64 << 20
	// MaxMetadata bounds the payloads of sections 1 to 5 together, in bytes.
	MaxMetadata = 256 << 20

	maxBulkHeader = 128 << 10 // MaxRuns runs at their longest take 78 KiB
	maxSmallMeta  = 64 << 10  // header, trailer and error records
)

const (
	preHeaderSize = 16
	crcSize       = 4
	recordAlign   = 8
)

// zeros is what fill and padding are made of and compared with.
var zeros [PageSize]byte

// preHeader is the fixed beginning of every record.
type preHeader struct {
	Type   Type
	Ref    Ref
	Length uint64 // of the payload, without padding and checksum
}

func (p preHeader) encode() [preHeaderSize]byte {
	var b [preHeaderSize]byte
	binary.LittleEndian.PutUint32(b[0:], uint32(p.Type))
	binary.LittleEndian.PutUint32(b[4:], uint32(p.Ref))
	binary.LittleEndian.PutUint64(b[8:], p.Length)
	return b
}

func decodePreHeader(b []byte) preHeader {
	return preHeader{
		Type:   Type(binary.LittleEndian.Uint32(b[0:])),
		Ref:    Ref(binary.LittleEndian.Uint32(b[4:])),
		Length: binary.LittleEndian.Uint64(b[8:]),
	}
}

// padding returns how many zero bytes follow a payload of the given length, so
// that the checksum after them ends on a multiple of recordAlign.
func padding(length uint64) int {
	return int(-(preHeaderSize + length + crcSize) % recordAlign)
}

// fill returns how many zero bytes stand between a bulk record's CBOR header
// of n bytes and its raw bytes, when the record begins at offset start.
func fill(start uint64, n int) int {
	return int(-(start + preHeaderSize + 4 + uint64(n)) % PageSize)
}

// tally counts the records of a stream and digests their pre-headers and
// checksums. A cryptographic hash over gigabytes of pages would cost more than
// writing them; over the checksums it costs nothing and still binds every
// record to its place.
type tally struct {
	records, bytes, pages uint64
	counts, sizes         map[Type]uint64
	digest                hash.Hash
}

func newTally() tally {
	return tally{counts: map[Type]uint64{}, sizes: map[Type]uint64{}, digest: sha256.New()}
}

// add counts one complete record.
func (t *tally) add(pre preHeader, crc [crcSize]byte) {
	size := preHeaderSize + pre.Length + uint64(padding(pre.Length)) + crcSize
	t.records++
	t.bytes += size
	t.counts[pre.Type]++
	t.sizes[pre.Type] += size
	b := pre.encode()
	t.digest.Write(b[:]) // a hash.Hash never returns an error
	t.digest.Write(crc[:])
}

// trailer returns the trailer that belongs after the records counted so far.
func (t *tally) trailer() *Trailer {
	return &Trailer{
		Magic:   TrailerMagic,
		Records: t.records,
		Bytes:   t.bytes,
		Counts:  maps.Clone(t.counts),
		Pages:   t.pages,
		Digest:  t.digest.Sum(nil),
	}
}

// differs names the first field in which two trailers differ, or returns "".
func (t *Trailer) differs(u *Trailer) string {
	switch {
	case t.Magic != u.Magic:
		return "magic number"
	case t.Records != u.Records:
		return "number of records"
	case t.Bytes != u.Bytes:
		return "number of bytes"
	case t.Pages != u.Pages:
		return "number of pages"
	case !maps.Equal(t.Counts, u.Counts):
		return "number of records by type"
	case !bytes.Equal(t.Digest, u.Digest):
		return "digest"
	}
	return ""
}
