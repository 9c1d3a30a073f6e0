package tracee

// Job is a batch that a thread is to run.
type Job struct {
	Live   *Live
	Thread *Thread
	Batch  *Batch
	Known  *Known // or nil
	// Ran, if set, is called as soon as the batch has run.
	Ran func()
	// Err is what Live.Run would have returned.
	Err error
}

// RunAll is Live.Run for many threads, one after the other. With several on their
// way at once, threads of stopped processes were seen to run on after our death,
// and others to end.
func RunAll(jobs []*Job) {
	for _, j := range jobs {
		if j.Err = j.Live.run(j.Thread, j.Known, j.Batch); j.Err == nil && j.Ran != nil {
			j.Ran()
		}
	}
}
