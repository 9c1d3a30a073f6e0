package image

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
)

// Report is what Verify found in a good image.
type Report struct {
	ID      string `json:"id"` // hexadecimal
	Records uint64 `json:"records"`
	Bytes   uint64 `json:"bytes"`
	Pages   uint64 `json:"pages"` // stored raw
}

// Verify reads a whole stream and checks everything a restore would check of
// it, and that nothing follows its trailer.
func Verify(r io.Reader) (*Report, error) {
	rd := NewReader(r)
	if err := rd.each(func(*Content) {}); err != nil {
		return nil, err
	}
	return rd.report(), nil
}

// each reads to the end of the stream and shows every bulk record to visit.
// It requires that nothing follows.
func (r *Reader) each(visit func(*Content)) error {
	for {
		c, err := r.Next()
		if errors.Is(err, io.EOF) {
			return r.AtEnd()
		}
		if err != nil {
			return err
		}
		visit(c)
		c.Release()
	}
}

// AtEnd checks that the stream ends after its trailer. On a pipe it waits until
// the writer closes its end.
func (r *Reader) AtEnd() error {
	var b [1]byte
	at := r.src.offset
	switch n, err := r.src.read(b[:]); {
	case n > 0:
		return fmt.Errorf("the image goes on after its trailer, which ends at offset %d", at)
	case !isEnd(err):
		return r.readError(err)
	}
	return nil
}

// report describes what was read so far.
func (r *Reader) report() *Report {
	return &Report{
		ID:      hex.EncodeToString(r.state.Header.ID[:]),
		Records: r.tally.records,
		Bytes:   r.tally.bytes,
		Pages:   r.tally.pages,
	}
}
