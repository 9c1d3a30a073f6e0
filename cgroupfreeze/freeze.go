package cgroupfreeze

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultTimeout bounds Freeze and Thaw when their context has no deadline.
const DefaultTimeout = 10 * time.Second

// ErrInside says that the caller itself lives in the cgroup: it would freeze
// with it and nobody would be left to thaw.
var ErrInside = errors.New("this process is itself in the cgroup to be frozen; run it outside the container")

// AncestorFrozenError says that a cgroup above is frozen, so that this one
// cannot be thawed.
type AncestorFrozenError struct {
	Path     string // the container's cgroup
	Ancestor string // the frozen cgroup above it
}

func (e *AncestorFrozenError) Error() string {
	return fmt.Sprintf("cgroup %s is held frozen by %s; thaw that first", e.Path, e.Ancestor)
}

const (
	// pollMin and pollMax bound the pause between two looks at the state. A
	// container of some ten tasks freezes in about a millisecond.
	pollMin = 30 * time.Microsecond
	pollMax = time.Millisecond
	// firstRound is how long the first attempt to freeze lasts; each
	// further one lasts twice as long.
	firstRound = 250 * time.Millisecond
	// breather is how long the tasks run between two attempts.
	breather = 2 * time.Millisecond
)

// Frozen tells whether the cgroup is frozen or asked to be, by its own setting
// or by that of a cgroup above it.
func (c *Cgroup) Frozen() (bool, error) {
	asked, err := c.freezer.asked()
	if err != nil || asked {
		return asked, err
	}
	thawed, err := c.freezer.thawed()
	return !thawed && err == nil, err
}

// Freeze freezes the cgroup and those below it, and returns when every task is
// frozen. A cgroup that is frozen already, as after `runc pause`, stays so.
//
// It waits until the context's deadline, or DefaultTimeout if there is none.
// If the tasks do not freeze in that time, or the context is cancelled, what
// Freeze did is put back and the error is a *TimeoutError that names the tasks
// in the way. ErrInside and *AncestorFrozenError are returned before anything
// is touched.
func (c *Cgroup) Freeze(ctx context.Context) error {
	ctx, cancel := bounded(ctx)
	defer cancel()
	if err := c.mayFreeze(); err != nil {
		return err
	}
	paused, err := c.freezer.asked()
	if err != nil {
		return err
	}
	begin := time.Now()
	if paused {
		err = c.attempt(ctx)
	} else {
		err = c.attemptInRounds(ctx)
	}
	if err == nil {
		return nil
	}
	return c.giveUp(ctx, err, begin, paused)
}

// mayFreeze refuses what would end in a cgroup that cannot be thawed any more.
func (c *Cgroup) mayFreeze() error {
	up, err := c.freezer.ancestor()
	if err != nil {
		return err
	}
	if up != "" {
		return &AncestorFrozenError{Path: c.dir, Ancestor: up}
	}
	pids, err := c.Processes()
	if err != nil {
		return err
	}
	if slices.Contains(pids, os.Getpid()) {
		return fmt.Errorf("cgroup %s: %w", c.dir, ErrInside)
	}
	return nil
}

// attemptInRounds lets the tasks run for a moment whenever an attempt has taken
// long, and tries again. One task may sleep uninterruptibly until another,
// already frozen, answers it: a reader of a FUSE file system whose daemon is in
// the same container. Only running again brings both to where they can freeze.
func (c *Cgroup) attemptInRounds(ctx context.Context) error {
	for limit := firstRound; ; limit *= 2 {
		round, cancel := context.WithTimeout(ctx, limit)
		err := c.attempt(round)
		cancel()
		if err == nil || ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
		if err := writeValue(c.ThawWrite()); err != nil {
			return err
		}
		pause(breather)
	}
}

// attempt asks the tasks to freeze and waits until they have.
func (c *Cgroup) attempt(ctx context.Context) error {
	if err := writeValue(c.FreezeWrite()); err != nil {
		return err
	}
	return await(ctx, func() (bool, error) {
		frozen, err := c.freezer.frozen()
		if err != nil || frozen {
			return frozen, err
		}
		return false, c.freezer.nudge()
	})
}

// giveUp puts back what a failed Freeze did and says why it failed. What its
// engine had asked to be paused stays so.
func (c *Cgroup) giveUp(ctx context.Context, cause error, begin time.Time, paused bool) error {
	lagging := c.lagging()
	if !paused {
		if err := c.Thaw(context.WithoutCancel(ctx)); err != nil {
			return errors.Join(cause, err)
		}
		lagging = stillAsleep(lagging)
	}
	if ctx.Err() == nil {
		return fmt.Errorf("freezing cgroup %s: %w", c.dir, cause)
	}
	return &TimeoutError{
		Path:  c.dir,
		After: time.Since(begin),
		Tasks: withoutVforkParents(lagging),
		Err:   cause,
	}
}

// Thaw thaws the cgroup and waits until it is thawed: until the context's
// deadline, or DefaultTimeout if there is none. It fails with an
// *AncestorFrozenError if a cgroup above keeps the tasks frozen; this cgroup's
// own setting is then thawed all the same.
func (c *Cgroup) Thaw(ctx context.Context) error {
	ctx, cancel := bounded(ctx)
	defer cancel()
	begin := time.Now()
	if err := writeValue(c.ThawWrite()); err != nil {
		return fmt.Errorf("thawing: %w", err)
	}
	err := await(ctx, func() (bool, error) {
		thawed, err := c.freezer.thawed()
		if err != nil || thawed {
			return thawed, err
		}
		if up, err := c.freezer.ancestor(); err != nil || up != "" {
			return false, errors.Join(err, &AncestorFrozenError{Path: c.dir, Ancestor: up})
		}
		return false, nil
	})
	if err != nil && ctx.Err() != nil {
		return &TimeoutError{Path: c.dir, Thawing: true, After: time.Since(begin), Err: err}
	}
	return err
}

// bounded gives the context a deadline if it has none.
func bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, DefaultTimeout)
}

// await calls done until it reports true or fails, with growing pauses. At the
// end of the context it returns the context's error.
func await(ctx context.Context, done func() (bool, error)) error {
	for wait := pollMin; ; wait = min(2*wait, pollMax) {
		ok, err := done()
		if err != nil || ok {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		pause(wait)
	}
}

// pause sleeps without the Go scheduler, whose timers go through epoll_wait(2)
// and are rounded up to a millisecond in an otherwise idle program. A signal may
// cut it short.
func pause(d time.Duration) {
	ts := unix.NsecToTimespec(d.Nanoseconds())
	_ = unix.Nanosleep(&ts, nil)
}
