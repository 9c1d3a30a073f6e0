package image

import (
	"bytes"
	"errors"
	"io"
	"runtime"
	"testing"
	"testing/iotest"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// readAll reads an image and returns its head and copies of its contents.
func readAll(t *testing.T, r io.Reader) (*Head, []Content) {
	t.Helper()
	rd := NewReader(r)
	h, err := rd.Head()
	check(t, err)
	var contents []Content
	for {
		c, err := rd.Next()
		if errors.Is(err, io.EOF) {
			return h, contents
		}
		check(t, err)
		if len(c.Raw) > 0 && c.Position%PageSize != 0 {
			t.Errorf("raw bytes of object #%d stand at %d", c.Ref, c.Position)
		}
		if len(c.Raw) > 0 && uintptr(unsafe.Pointer(&c.Raw[0]))%PageSize != 0 {
			t.Errorf("raw bytes of object #%d are not aligned in memory", c.Ref)
		}
		copied := *c
		copied.Raw = bytes.Clone(c.Raw)
		contents = append(contents, copied)
		c.Release()
	}
}

func checkSample(t *testing.T, r io.Reader) {
	t.Helper()
	h, contents := readAll(t, r)
	compare(t, sampleHeader(), h.Header)
	compare(t, sampleArch(), h.Arch)
	compare(t, sampleContainer(), h.Container)
	compare(t, sampleTree(), h.Tree)
	var tasks []*Task
	objects := map[Ref]any{}
	for i := range h.Container.Namespaces {
		objects[Ref(i+1)] = &h.Container.Namespaces[i]
	}
	for _, r := range sampleObjects() {
		v, err := record(r.t, r.v)
		check(t, err)
		if task, ok := v.(*Task); ok {
			tasks = append(tasks, task)
		} else {
			objects[Ref(len(objects)+1)] = v
		}
	}
	compare(t, tasks, h.Tasks)
	compare(t, objects, h.Objects)
	ignore := cmpopts.IgnoreFields(Content{}, "Position", "pool")
	if d := cmp.Diff(sampleContents(), contents, ignore, cmpopts.EquateEmpty()); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
}

func TestRoundTrip(t *testing.T) {
	image := sampleImage(t)
	for name, wrap := range map[string]func(io.Reader) io.Reader{
		"file":     func(r io.Reader) io.Reader { return r },
		"one byte": iotest.OneByteReader,
		"half":     iotest.HalfReader,
		"data+EOF": iotest.DataErrReader,
	} {
		t.Run(name, func(t *testing.T) { checkSample(t, wrap(bytes.NewReader(image))) })
	}
}

func TestRoundTripThroughPipe(t *testing.T) {
	image := sampleImage(t)
	r, w := io.Pipe()
	go func() {
		_, err := io.Copy(w, iotest.HalfReader(bytes.NewReader(image)))
		w.CloseWithError(err)
	}()
	checkSample(t, r)
}

// TestNoWaitAfterTrailer reads from a pipe that stays open.
func TestNoWaitAfterTrailer(t *testing.T) {
	r, w := io.Pipe()
	defer w.Close()
	go w.Write(sampleImage(t))
	checkSample(t, r)
}

func TestTypedGetters(t *testing.T) {
	h, _ := readAll(t, bytes.NewReader(sampleImage(t)))
	if h.MM(refMMInit) == nil || h.Files(refFilesInit) == nil || h.FS(refFS) == nil || h.Sighand(refSighand) == nil ||
		h.Pipe(refPipe) == nil || h.Shmem(refShmem) == nil || h.File(refExe) == nil || h.Namespace(1) == nil {
		t.Error("a getter does not find its object")
	}
	if h.MM(refPipe) != nil || h.File(0) != nil || h.Task(9) != nil || h.Task(7) != h.Tasks[1] {
		t.Error("a getter finds what is not there")
	}
}

// TestRecordsAligned checks the framing by hand, without the Reader.
func TestRecordsAligned(t *testing.T) {
	image := sampleImage(t)
	records := 0
	for at := uint64(0); at < uint64(len(image)); records++ {
		if at%recordAlign != 0 {
			t.Fatalf("record %d begins at %d", records, at)
		}
		p := decodePreHeader(image[at:])
		at += preHeaderSize + p.Length
		for ; (at+crcSize)%recordAlign != 0; at++ {
			if image[at] != 0 {
				t.Fatalf("padding at %d is not zero", at)
			}
		}
		at += crcSize
	}
	if want := 4 + len(sampleObjects()) + len(sampleContents()) + 1; records != want {
		t.Errorf("%d records, want %d", records, want)
	}
}

func TestDeterministic(t *testing.T) {
	if !bytes.Equal(sampleImage(t), sampleImage(t)) {
		t.Error("the same records make different images")
	}
}

// sizes records how large each write was.
type sizes []int

func (s *sizes) Write(p []byte) (int, error) {
	*s = append(*s, len(p))
	return len(p), nil
}

func TestTwoWritesPerRecord(t *testing.T) {
	var out sizes
	w := NewWriter(&out)
	writeHead(t, w)
	head := len(out)
	raw := page(1, 256)
	big := MM{Exe: refExe, Areas: []Area{{Start: 0, End: 16 << 20, Kind: AreaAnon}}}
	ref := w.NewRef()
	check(t, w.Record(TypeMM, ref, big))
	for i := range uint64(8) {
		check(t, w.Pages(ref, []Run{{Addr: i << 20, Count: 256}}, raw, Checksum(raw)))
	}
	if n := len(out) - head; n != 16 {
		t.Errorf("8 records of pages took %d writes, want 16", n)
	}
}

// TestContentsHeld holds several records while the reader runs ahead, and
// releases them from another goroutine.
func TestContentsHeld(t *testing.T) {
	rd := NewReader(bytes.NewReader(sampleImage(t)))
	held := make(chan *Content, 16)
	go func() {
		defer close(held)
		for {
			c, err := rd.Next()
			if err != nil {
				return
			}
			held <- c
		}
	}()
	want := sampleContents()
	var all []*Content
	for c := range held {
		all = append(all, c)
	}
	for i, c := range all {
		if !bytes.Equal(c.Raw, want[i].Raw) {
			t.Errorf("record %d changed while it was held", i)
		}
		c.Release()
		c.Release()
	}
	if len(all) != len(want) {
		t.Errorf("%d records, want %d", len(all), len(want))
	}
}

func TestErrorRecord(t *testing.T) {
	for name, begin := range map[string]func(w *Writer){
		"first":          func(w *Writer) {},
		"after header":   func(w *Writer) { check(t, w.Record(TypeHeader, 0, sampleHeader())) },
		"after the head": func(w *Writer) { writeHead(t, w) },
		"after contents": func(w *Writer) { writeHead(t, w); check(t, writeContent(w, sampleContents()[0])) },
		"after a refusal": func(w *Writer) {
			writeHead(t, w)
			if w.Pages(refPipe, []Run{{Addr: 0, Count: 1}}, page(0, 1), Checksum(page(0, 1))) == nil {
				t.Error("pages of a pipe were written")
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			w := NewWriter(&b)
			begin(w)
			cause := Error{Phase: "collect", Task: "pid 7", Object: "fd 3", Cause: "io_uring", Remedy: "close\x00 it"}
			check(t, w.Fail(cause))
			if err := w.Fail(cause); !errors.Is(err, ErrClosed) {
				t.Errorf("second Fail: %v", err)
			}
			_, err := Verify(bytes.NewReader(b.Bytes()))
			var failed *FailedError
			if !errors.As(err, &failed) || failed.Record.Remedy != "close it" {
				t.Fatalf("Verify: %v", err)
			}
			const want = "the checkpoint that wrote this image failed in phase collect: pid 7: fd 3: io_uring (close it)"
			if err.Error() != want {
				t.Errorf("message %q", err)
			}
			s, err := Inspect(bytes.NewReader(b.Bytes()))
			check(t, err)
			if s.Failure == nil || s.Failure.Cause != "io_uring" {
				t.Errorf("Inspect shows no failure: %+v", s.Failure)
			}
		})
	}
}

func TestVerify(t *testing.T) {
	image := sampleImage(t)
	r, err := Verify(bytes.NewReader(image))
	check(t, err)
	compare(t, &Report{
		ID:      "deadbeef0405060708090a0b0c0d0e0f",
		Records: uint64(4 + len(sampleObjects()) + len(sampleContents()) + 1),
		Bytes:   uint64(len(image)), Pages: 7,
	}, r)
}

// failAfter fails when more than n bytes were written.
type failAfter struct{ n int }

var errDisk = errors.New("no space left on device")

func (f *failAfter) Write(p []byte) (int, error) {
	if f.n -= len(p); f.n < 0 {
		return 0, errDisk
	}
	return len(p), nil
}

func TestWriteErrorIsFinal(t *testing.T) {
	w := NewWriter(&failAfter{20000})
	writeHead(t, w)
	for i := uint64(0); ; i++ {
		if err := writeContent(w, sampleContents()[0]); err != nil {
			break
		}
	}
	for _, err := range []error{w.Close(), w.Fail(Error{Cause: "x"}), w.Record(TypeFS, w.NewRef(), FS{})} {
		if !errors.Is(err, errDisk) {
			t.Errorf("%v does not wrap the write error", err)
		}
	}
}

func TestReadError(t *testing.T) {
	image := sampleImage(t)
	for _, n := range []int{0, 10, 3000, len(image) - 30} {
		r := io.MultiReader(bytes.NewReader(image[:n]), iotest.ErrReader(errDisk))
		if _, err := Verify(r); !errors.Is(err, errDisk) {
			t.Errorf("after %d bytes: %v", n, err)
		}
	}
}

// TestMemoryFlat writes and reads far more than it may allocate.
func TestMemoryFlat(t *testing.T) {
	const records, most = 256, 16 << 20
	pr, pw := io.Pipe()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	go func() {
		w := NewWriter(pw)
		writeHead(t, w)
		ref := w.NewRef()
		err := w.Record(TypeMM, ref, MM{Exe: refExe, Areas: []Area{{Start: 0, End: records << 20, Kind: AreaAnon}}})
		raw := page('x', 256)
		for i := uint64(0); i < records && err == nil; i++ {
			err = w.Pages(ref, []Run{{Addr: i << 20, Count: 256}}, raw, Checksum(raw))
		}
		pw.CloseWithError(errors.Join(err, w.Bytes(refPipe, 0, []byte("hello")), w.Close()))
	}()
	r, err := Verify(pr)
	check(t, err)
	runtime.ReadMemStats(&after)
	if used := after.TotalAlloc - before.TotalAlloc; used > most {
		t.Errorf("%d bytes were allocated for %d of pages", used, r.Pages*PageSize)
	}
}

// Late signals stand in the trailer and are found behind those of their task.
func TestLateSignals(t *testing.T) {
	info := func(sig byte) []byte { return append([]byte{sig}, make([]byte, siginfoSize-1)...) }
	var out bytes.Buffer
	w := NewWriter(&out)
	writeHead(t, w)
	for _, c := range sampleContents() {
		check(t, writeContent(w, c))
	}
	w.Late([]Late{{Pid: 1, Pending: [][]byte{info(10)}}, {Pid: 1, Tid: 1, Pending: [][]byte{info(12), info(34)}}})
	check(t, w.Close())
	h, _ := readAll(t, &out)
	for _, task := range h.Tasks {
		if task.Pid != 1 {
			continue
		}
		shared, own := task.Pending, task.Threads[0].Pending
		if n := len(shared); n == 0 || shared[n-1][0] != 10 {
			t.Errorf("the process has %v", shared)
		}
		if n := len(own); n < 2 || own[n-2][0] != 12 || own[n-1][0] != 34 {
			t.Errorf("the thread has %v", own)
		}
	}
}
