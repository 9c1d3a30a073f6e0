package tracee

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Job is a batch that a thread is to run.
type Job struct {
	Live   *Live
	Thread *Thread
	Batch  *Batch
	Known  *Known // or nil
	// Space is the same for threads in one address space, which share a cave.
	Space any
	// Ran, if set, is called as soon as the batch has run.
	Ran func()
	// Err is what Live.Run would have returned.
	Err error
}

// abreast is how many threads are on their way at once.
const abreast = 8

// RunAll is Live.Run for many threads. A batch takes three turns of its thread, and
// each is long waited for, as another processor may have to be woken and always
// has to change threads. So several are on their way, each of which has come to
// its stop as a rule by the time that it is looked at again.
func RunAll(jobs []*Job) {
	lanes := map[any]*lane{}
	var waiting []*lane
	for _, j := range jobs {
		l := lanes[j.Space]
		if l == nil {
			l = &lane{}
			lanes[j.Space] = l
			waiting = append(waiting, l)
		}
		l.jobs = append(l.jobs, j)
	}
	var air []*flight
	for len(waiting)+len(air) > 0 {
		for len(air) < abreast && len(waiting) > 0 {
			l := waiting[0]
			waiting = waiting[1:]
			f, again := l.start()
			if f != nil {
				air = append(air, f)
			}
			if again && len(l.jobs) > 0 {
				waiting = append(waiting, l)
			} else {
				l.idle = true
			}
		}
		if len(air) == 0 {
			continue
		}
		f := air[0]
		air = air[1:]
		if f.next() {
			air = append(air, f)
			continue
		}
		f.lane.flights--
		if f.lane.idle && len(f.lane.jobs) > 0 {
			f.lane.idle = false
			waiting = append(waiting, f.lane)
		}
	}
}

// lane holds the jobs of one address space.
type lane struct {
	jobs    []*Job
	flights int
	live    *Live // of the flights
	idle    bool  // it starts no more before one of its flights has landed
}

// start sends the next job on its way, or does it at once if it can have no
// company. again is false if it has to wait for one on its way.
func (l *lane) start() (f *flight, again bool) {
	j := l.jobs[0]
	if l.flights > 0 && j.Live != l.live { // which does not know of its slots
		return nil, false
	}
	if len(j.Batch.Calls) == 0 {
		l.jobs = l.jobs[1:]
		return nil, true
	}
	v, err := j.Live.prepare(j.Thread, j.Known)
	if errors.Is(err, errNoneFree) && l.flights > 0 {
		return nil, false
	}
	if err == nil && v.alone() && l.flights > 0 {
		delete(j.Live.taken, v.slot)
		return nil, false
	}
	l.jobs = l.jobs[1:]
	if err != nil {
		j.Err = err
		return nil, true
	}
	if v.alone() {
		if j.Err = v.pay(j.Batch); j.Err == nil && j.Ran != nil {
			j.Ran()
		}
		return nil, true
	}
	f = &flight{visit: v, job: j, lane: l}
	if err = v.park(j.Batch); err == nil {
		err = step(PointMap, func() error { return v.start(0) })
	}
	if err != nil {
		f.land(err)
		return nil, true
	}
	l.flights++
	l.live = j.Live
	return f, true
}

// alone tells a visit that has to be attended to all the time, or that a group stop
// of its process would concern.
func (v *visit) alone() bool {
	return v.quiet || v.punished != nil || v.report == 0 || v.report == unix.SIGCONT
}

// flight is a visit on its way.
type flight struct {
	*visit
	job    *Job
	lane   *lane
	loaded []byte // its batch, once it runs
	ran    bool
}

// next waits for the thread's stop and sends it on. It is false once the thread is
// as it was.
func (f *flight) next() bool {
	var err error
	switch {
	case f.ran:
		f.land(nil)
		return false
	case f.loaded == nil:
		if err = f.mapMemory(); err == nil {
			f.loaded, err = f.load(f.job.Batch)
		}
		if err == nil {
			err = step(PointBatch, func() error { return f.start(0) })
		}
	default:
		if err = f.advance(places.ran); err == nil {
			err = f.unload(f.job.Batch, f.loaded)
		}
		if err == nil && f.job.Ran != nil {
			f.job.Ran()
		}
		if err == nil {
			err = step(PointUnmap, func() error { return f.start(0) })
		}
		f.ran = true
	}
	if err != nil {
		f.land(err)
		return false
	}
	return true
}

// land brings the thread back to where it was.
func (f *flight) land(err error) {
	if left := f.leave(); err == nil {
		err = left
	}
	f.job.Err = err
}
