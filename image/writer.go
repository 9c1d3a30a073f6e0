package image

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"strings"
)

// gather is how many small bytes a Writer holds back at most. It keeps a head
// of thousands of records to a few writes.
const gather = 64 << 10

// Writer writes one stream. It is not safe for concurrent use.
//
// A record that breaks a rule of the format is refused with a *FormatError
// before any of it is written, so the caller can still end the stream with
// Fail. An error of the underlying writer is final: every later call returns it.
type Writer struct {
	w      io.Writer
	small  []byte // written before the next large piece
	offset uint64 // of the next byte
	start  preHeader
	crc    uint32 // of the record in hand
	refs   Ref
	tally  tally
	state  *builder
	late   []Late
	err    error
}

// NewWriter returns a Writer to w, which stays the caller's to close.
func NewWriter(w io.Writer) *Writer {
	return &Writer{w: w, small: make([]byte, 0, gather+PageSize), tally: newTally(), state: newBuilder()}
}

// NewRef returns a reference for an object that is about to be written.
// Records must stand in the order of their references, and an object after
// those it refers to: take an object's reference when its own targets are
// written. Those of the namespaces are taken for the container record.
func (w *Writer) NewRef() Ref {
	w.refs++
	return w.refs
}

// Offset returns where the next record will begin, in bytes.
func (w *Writer) Offset() uint64 { return w.offset }

// Record writes a metadata record. v is the structure that belongs to t, or a
// pointer to one, and must not be changed afterwards: the Writer refers to it
// in checking later records. Close writes the trailer and Fail an error
// record; Record refuses both.
func (w *Writer) Record(t Type, ref Ref, v any) error {
	if w.err != nil {
		return w.err
	}
	if t == TypeTrailer || t == TypeError {
		return w.refuse(t, errors.New("it is written by Close or Fail"))
	}
	v, err := record(t, v)
	if err != nil {
		return w.refuse(t, err)
	}
	return w.metadata(t, ref, v)
}

// metadata checks, encodes and writes the structure v points to.
func (w *Writer) metadata(t Type, ref Ref, v any) error {
	payload, err := encode(v)
	if err != nil {
		return w.refuse(t, err)
	}
	if uint64(len(payload)) > t.limit() {
		return w.refuse(t, fmt.Errorf("its %d bytes are more than %d", len(payload), t.limit()))
	}
	if err := w.state.add(t, ref, v, uint64(len(payload))); err != nil {
		return w.refuse(t, err)
	}
	w.begin(t, ref, uint64(len(payload)))
	w.put(payload)
	return w.end()
}

// Pages writes the pages of an address space or of shared memory. raw holds
// the pages of the Stored runs, in order, and is not kept; sum is
// its Checksum.
func (w *Writer) Pages(ref Ref, runs []Run, raw []byte, sum uint32) error {
	if err := w.content(TypePages, ref, len(raw)); err != nil {
		return err
	}
	if err := w.state.pages(ref, runs, uint64(len(raw))); err != nil {
		return w.refuse(TypePages, err)
	}
	w.state.commit(TypePages, ref)
	w.tally.pages += uint64(len(raw)) / PageSize
	return w.bulk(TypePages, ref, Pages{Runs: runs}, raw, sum)
}

// Bytes writes raw bytes of a pipe or a file that stand at offset in it.
func (w *Writer) Bytes(ref Ref, offset uint64, raw []byte) error {
	if err := w.content(TypeBytes, ref, len(raw)); err != nil {
		return err
	}
	if err := w.state.bytes(ref, offset, uint64(len(raw))); err != nil {
		return w.refuse(TypeBytes, err)
	}
	w.state.commit(TypeBytes, ref)
	return w.bulk(TypeBytes, ref, Bytes{Offset: offset}, raw, Checksum(raw))
}

// content checks what both kinds of bulk record share.
func (w *Writer) content(t Type, ref Ref, n int) error {
	if w.err != nil {
		return w.err
	}
	if n > MaxRaw {
		return w.refuse(t, fmt.Errorf("%d raw bytes are more than %d", n, MaxRaw))
	}
	if err := w.state.place(t, ref); err != nil {
		return w.refuse(t, err)
	}
	return nil
}

// bulk writes a record with raw bytes, which begin on a page boundary of the
// stream and have the checksum sum.
func (w *Writer) bulk(t Type, ref Ref, header any, raw []byte, sum uint32) error {
	head, err := encode(header)
	if err != nil {
		return w.refuse(t, err)
	}
	gap := 0
	if len(raw) > 0 {
		gap = fill(w.offset, len(head))
	}
	w.begin(t, ref, uint64(4+len(head)+gap+len(raw)))
	w.put(binary.LittleEndian.AppendUint32(nil, uint32(len(head))))
	w.put(head)
	w.put(zeros[:gap])
	w.crc = joined(w.crc, sum, len(raw))
	w.append(raw)
	return w.end()
}

// Late notes signals that came too late for the records of their tasks, for the
// trailer.
func (w *Writer) Late(l []Late) { w.late = append(w.late, l...) }

// Close writes the trailer and flushes. It is an error to close a stream whose
// contents are incomplete.
func (w *Writer) Close() error {
	if w.err != nil {
		return w.err
	}
	if err := w.state.place(TypeTrailer, 0); err != nil {
		return w.refuse(TypeTrailer, err)
	}
	if err := w.state.finish(); err != nil {
		return w.refuse(TypeTrailer, err)
	}
	if err := w.state.addLate(w.late); err != nil {
		return w.refuse(TypeTrailer, err)
	}
	trailer := w.tally.trailer()
	trailer.Late = w.late
	return w.last(TypeTrailer, trailer)
}

// Fail writes the error record as the last of the stream and flushes. It may
// follow any record, also one that was refused.
func (w *Writer) Fail(e Error) error {
	if w.err != nil {
		return w.err
	}
	const most = 4 << 10 // keeps even an error that quotes a long name within its record
	for _, s := range []*string{&e.Phase, &e.Task, &e.Object, &e.Cause, &e.Remedy} {
		cut := strings.ToValidUTF8((*s)[:min(len(*s), most)], "")
		*s = strings.ReplaceAll(cut, "\x00", "")
	}
	return w.last(TypeError, &e)
}

// last writes a record after which the stream is closed.
func (w *Writer) last(t Type, v any) error {
	if err := w.metadata(t, 0, v); err != nil {
		return err
	}
	if err := w.flush(); err != nil {
		return err
	}
	w.err = ErrClosed
	return nil
}

// refuse describes a record that breaks a rule; nothing of it was written.
func (w *Writer) refuse(t Type, err error) error {
	return &FormatError{Offset: w.offset, Type: t, Reason: err.Error(), Err: err}
}

// begin starts a record.
func (w *Writer) begin(t Type, ref Ref, length uint64) {
	w.start = preHeader{Type: t, Ref: ref, Length: length}
	w.crc = 0
	b := w.start.encode()
	w.put(b[:])
}

// put adds bytes to the record in hand.
func (w *Writer) put(p []byte) {
	w.crc = crc32.Update(w.crc, castagnoli, p)
	w.append(p)
}

// append adds bytes to the stream. Small pieces are gathered; a large one is
// written from where it lies, so that pages are never copied.
func (w *Writer) append(p []byte) {
	w.offset += uint64(len(p))
	if len(w.small)+len(p) <= cap(w.small) {
		w.small = append(w.small, p...)
		return
	}
	w.write(w.small)
	w.small = w.small[:0]
	if len(p) < gather {
		w.small = append(w.small, p...)
		return
	}
	w.write(p)
}

// end pads the record in hand and closes it with its checksum.
func (w *Writer) end() error {
	w.put(zeros[:padding(w.start.Length)])
	var sum [crcSize]byte
	binary.LittleEndian.PutUint32(sum[:], w.crc)
	w.put(sum[:])
	w.tally.add(w.start, sum)
	return w.err
}

// flush writes what was gathered.
func (w *Writer) flush() error {
	w.write(w.small)
	w.small = w.small[:0]
	return w.err
}

// write passes bytes on and remembers the first error.
func (w *Writer) write(p []byte) {
	if w.err != nil || len(p) == 0 {
		return
	}
	n, err := w.w.Write(p)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	if err != nil {
		w.err = fmt.Errorf("write the image: %w", err)
	}
}
