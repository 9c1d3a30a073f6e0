package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"reflect"
)

// Reader reads one stream, front to back: Head first, then Next until io.EOF.
// It may read up to 64 KiB past the trailer. One goroutine at a time may call
// Head and Next; a Content may be released from any.
type Reader struct {
	src     *source
	state   *builder
	tally   tally
	start   uint64    // offset of the record in hand
	pre     preHeader // of the record in hand
	crc     uint32
	peeked  bool   // pre is read, its record is not
	ready   bool   // the head is complete
	scratch []byte // payload of the record in hand
	blank   [PageSize]byte
	weight  uint64 // memory the decoded head takes, estimated
	pool    pool
	err     error // final
}

// Content is one bulk record: pages of an address space or of shared memory
// (TypePages), or bytes of a pipe or a file (TypeBytes).
type Content struct {
	Type     Type
	Ref      Ref
	Runs     []Run  // TypePages
	Offset   uint64 // TypeBytes: where in the object Raw belongs
	Raw      []byte // page-aligned in memory; nil after Release
	Position uint64 // where Raw stands in the stream, a multiple of PageSize

	pool pool
}

// Release gives Raw back to the reader for another record. The Content is the
// caller's until then, however many records are read meanwhile; without
// Release the garbage collector takes it.
func (c *Content) Release() {
	if c.Raw != nil {
		c.pool.put(c.Raw)
		c.Raw = nil
	}
}

// NewReader returns a Reader of r.
func NewReader(r io.Reader) *Reader {
	return &Reader{src: newSource(r), state: newBuilder(), tally: newTally(), pool: make(pool, poolSize)}
}

// Head reads and checks sections 1 to 5, and reads no raw bytes. Its errors
// are ErrNotImage, *RevisionError, *FormatError (wrapping ErrTruncated where
// the stream ends early), *FailedError or one of the underlying reader.
func (r *Reader) Head() (*Head, error) {
	for !r.ready {
		if err := r.headRecord(); err != nil {
			return nil, err
		}
	}
	return &r.state.Head, nil
}

// headRecord reads one record of the head, or finds its end.
func (r *Reader) headRecord() error {
	if err := r.next(); err != nil {
		return err
	}
	s := types[r.pre.Type].section
	if s == sectionContents || s == sectionTrailer {
		r.ready = true
		r.src.contents = true
		r.scratch = nil // may have grown to the largest record of the head
		return nil
	}
	return r.metadata()
}

// Next reads the next bulk record and verifies its checksum. It returns io.EOF
// after a valid trailer, *FailedError after an error record, and otherwise the
// errors of Head.
func (r *Reader) Next() (*Content, error) {
	if _, err := r.Head(); err != nil {
		return nil, err
	}
	if err := r.next(); err != nil {
		return nil, err
	}
	if r.pre.Type.bulk() {
		return r.content()
	}
	if err := r.metadata(); err != nil {
		return nil, err
	}
	return nil, r.fail(io.EOF)
}

// next reads the next record's pre-header, unless it is read already, and
// checks that such a record may stand here.
func (r *Reader) next() error {
	if r.err != nil {
		return r.err
	}
	if r.peeked {
		return nil
	}
	r.start, r.crc = r.src.offset, 0
	var b [preHeaderSize]byte
	n, err := r.src.read(b[:])
	if err != nil {
		return r.fail(r.noRecord(n, err))
	}
	r.sum(b[:])
	r.pre = decodePreHeader(b[:])
	r.peeked = true
	if r.start == 0 && !looksLikeImage(r.pre) {
		return r.fail(ErrNotImage)
	}
	if r.pre.Length > r.pre.Type.limit() {
		return r.broken("its payload of %d bytes is longer than %d", r.pre.Length, r.pre.Type.limit())
	}
	if err := r.state.place(r.pre.Type, r.pre.Ref); err != nil {
		return r.refuse(err)
	}
	return nil
}

// looksLikeImage reports whether a stream may begin with this pre-header. An
// error record stands first where a checkpoint failed before its header.
func looksLikeImage(p preHeader) bool {
	return (p.Type == TypeHeader || p.Type == TypeError) && p.Ref == 0 && p.Length <= maxSmallMeta
}

// noRecord explains the end of the stream where a record should begin.
func (r *Reader) noRecord(n int, err error) error {
	switch {
	case !isEnd(err):
		return r.readError(err)
	case r.start == 0:
		return fmt.Errorf("%w: it has only %d bytes", ErrNotImage, n)
	}
	return fmt.Errorf("%w: it ends at offset %d without a trailer", ErrTruncated, r.start+uint64(n))
}

func isEnd(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

// metadata reads the record in hand, verifies and checks it.
func (r *Reader) metadata() error {
	if err := r.payload(); err != nil {
		return err
	}
	sum, err := r.finish()
	if err != nil {
		return err
	}
	v, err := r.decoded()
	if err != nil {
		return r.refuse(err)
	}
	if err := r.state.add(r.pre.Type, r.pre.Ref, v, r.pre.Length); err != nil {
		return r.refuse(err)
	}
	switch v := v.(type) {
	case *Trailer:
		err = r.trailer(v)
	case *Error:
		err = r.fail(&FailedError{Record: *v})
	}
	r.tally.add(r.pre, sum)
	return err
}

// payload reads the payload of a metadata record into scratch. The buffer
// grows only as bytes arrive, so a length that lies costs its sender as much
// as it costs us.
func (r *Reader) payload() error {
	if err := r.state.room(r.pre.Type, r.pre.Length); err != nil {
		return r.refuse(err)
	}
	r.scratch = r.scratch[:0]
	for left := int(r.pre.Length); left > 0; {
		n := min(left, max(headAhead, len(r.scratch)))
		r.scratch = append(r.scratch, make([]byte, n)...)
		if err := r.take(r.scratch[len(r.scratch)-n:]); err != nil {
			return err
		}
		left -= n
	}
	return nil
}

// decoded decodes the payload in scratch.
func (r *Reader) decoded() (any, error) {
	size, err := decodedSize(r.pre.Type, r.scratch)
	if err != nil {
		return nil, err
	}
	r.weight += size
	if most := decodedLimit(r.state.metadata + r.pre.Length); r.weight > most {
		return nil, fmt.Errorf("the metadata would take more than %d bytes of memory", most)
	}
	v := reflect.New(types[r.pre.Type].record).Interface()
	if err := r.revision(v); err != nil {
		return nil, err
	}
	return v, decode(r.scratch, v)
}

// revision looks at a header's magic number and revision alone: the fields of
// a newer revision may have types that this one cannot decode.
func (r *Reader) revision(v any) error {
	if _, ok := v.(*Header); !ok {
		return nil
	}
	var h struct {
		Magic    uint64 `cbor:"1,keyasint"`
		Revision uint32 `cbor:"2,keyasint"`
	}
	if err := decode(r.scratch, &h); err != nil {
		return err
	}
	return checkHeader(&Header{Magic: h.Magic, Revision: h.Revision, ByteOrder: "little"})
}

// trailer compares the stream with what its trailer says of it.
func (r *Reader) trailer(t *Trailer) error {
	if what := r.tally.trailer().differs(t); what != "" {
		return r.broken("the stream's %s is not what the trailer says", what)
	}
	err := r.state.finish()
	if err == nil {
		err = r.state.addLate(t.Late)
	}
	if err != nil {
		return r.refuse(err)
	}
	return nil
}

// content reads the bulk record in hand.
func (r *Reader) content() (*Content, error) {
	head, err := r.bulkHeader()
	if err != nil {
		return nil, err
	}
	c := &Content{Type: r.pre.Type, Ref: r.pre.Ref, Position: r.src.offset, pool: r.pool}
	if n := r.start + preHeaderSize + r.pre.Length - r.src.offset; n > 0 {
		c.Raw = r.pool.get(int(n))
	}
	err = r.take(c.Raw)
	if err == nil {
		err = r.contentEnd(c, head)
	}
	if err != nil {
		c.Release()
		return nil, err
	}
	return c, nil
}

// bulkHeader reads a bulk record up to its raw bytes and returns its CBOR
// header, which is not verified yet.
func (r *Reader) bulkHeader() ([]byte, error) {
	const lengthSize = 4
	var b [lengthSize]byte
	if r.pre.Length < lengthSize {
		return nil, r.broken("a payload of %d bytes has no header", r.pre.Length)
	}
	if err := r.take(b[:]); err != nil {
		return nil, err
	}
	n, left := uint64(binary.LittleEndian.Uint32(b[:])), r.pre.Length-lengthSize
	if n > maxBulkHeader || n > left {
		return nil, r.broken("its header of %d bytes is too long", n)
	}
	left -= n
	if uint64(cap(r.scratch)) < n {
		r.scratch = make([]byte, n)
	}
	head := r.scratch[:n]
	if err := r.take(head); err != nil || left == 0 {
		return head, err
	}
	gap := fill(r.start, int(n))
	if left <= uint64(gap) || left-uint64(gap) > MaxRaw {
		return nil, r.broken("%d bytes after its header are too few or too many", left)
	}
	return head, r.zeros(gap)
}

// contentEnd verifies a bulk record and decodes its header.
func (r *Reader) contentEnd(c *Content, head []byte) error {
	sum, err := r.finish()
	if err != nil {
		return err
	}
	if c.Type == TypePages {
		err = r.pages(c, head)
	} else {
		err = r.bytes(c, head)
	}
	if err != nil {
		return r.refuse(err)
	}
	r.state.commit(c.Type, c.Ref)
	r.tally.add(r.pre, sum)
	return nil
}

func (r *Reader) pages(c *Content, head []byte) error {
	var h Pages
	if err := decode(head, &h); err != nil {
		return err
	}
	c.Runs = h.Runs
	r.tally.pages += uint64(len(c.Raw)) / PageSize
	return r.state.pages(c.Ref, h.Runs, uint64(len(c.Raw)))
}

func (r *Reader) bytes(c *Content, head []byte) error {
	var h Bytes
	if err := decode(head, &h); err != nil {
		return err
	}
	c.Offset = h.Offset
	return r.state.bytes(c.Ref, h.Offset, uint64(len(c.Raw)))
}

// finish reads the padding and the checksum of the record in hand and compares
// the latter.
func (r *Reader) finish() (sum [crcSize]byte, err error) {
	if err := r.zeros(padding(r.pre.Length)); err != nil {
		return sum, err
	}
	want := r.crc
	if err := r.take(sum[:]); err != nil {
		return sum, err
	}
	if got := binary.LittleEndian.Uint32(sum[:]); got != want {
		return sum, r.broken("checksum %#08x does not match its contents, which have %#08x: the image is damaged", got, want)
	}
	r.peeked = false
	return sum, nil
}

// take reads the next bytes of the record in hand.
func (r *Reader) take(p []byte) error {
	if len(p) == 0 {
		return nil
	}
	if _, err := r.src.read(p); isEnd(err) {
		e := r.formatError("the image is cut short: it ends at offset %d within the record", r.src.offset)
		e.Err = ErrTruncated
		return r.fail(e)
	} else if err != nil {
		return r.fail(r.readError(err))
	}
	r.sum(p)
	return nil
}

// zeros reads n bytes, at most PageSize, that must be zero.
func (r *Reader) zeros(n int) error {
	b := r.blank[:n]
	if err := r.take(b); err != nil {
		return err
	}
	if !bytes.Equal(b, zeros[:n]) {
		return r.broken("bytes between its parts are not zero")
	}
	return nil
}

func (r *Reader) sum(p []byte) { r.crc = crc32.Update(r.crc, castagnoli, p) }

// fail makes err the result of every later call.
func (r *Reader) fail(err error) error {
	r.err = err
	return err
}

func (r *Reader) formatError(format string, args ...any) *FormatError {
	return &FormatError{Offset: r.start, Type: r.pre.Type, Reason: fmt.Sprintf(format, args...)}
}

// broken fails with a rule that the record in hand breaks.
func (r *Reader) broken(format string, args ...any) error {
	return r.fail(r.formatError(format, args...))
}

// refuse fails with an error found in checking the record in hand. What is
// wrong with the stream as a whole needs no record's name.
func (r *Reader) refuse(err error) error {
	var newer *RevisionError
	if errors.Is(err, ErrNotImage) || errors.As(err, &newer) {
		return r.fail(err)
	}
	e := r.formatError("%s", err)
	e.Err = err
	return r.fail(e)
}

func (r *Reader) readError(err error) error {
	return fmt.Errorf("read the image at offset %d: %w", r.src.offset, err)
}
