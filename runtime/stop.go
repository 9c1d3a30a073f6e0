package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/ocickpt/ocickpt/cgroupfreeze"
	"github.com/ocickpt/ocickpt/runtime/guardian"
)

// stop brings the container to rest.
func (k *checkpoint) stop(ctx context.Context) error {
	k.learned.ready()
	if err := k.liftQuota(); err != nil {
		return err
	}
	var err error
	if k.thaw, err = k.guard.Promise(guardian.Release(k.c.cgroupPaths, k.halt.Paused)); err != nil {
		return err
	}
	k.stopped = time.Now()
	return k.halt.Stop(ctx)
}

// lifted is a cpu quota that is off for as long as the container is stopped:
// tasks out of quota neither freeze nor make our calls in time.
type lifted struct {
	entry guardian.Entry
	limit cgroupfreeze.Limit
}

func (k *checkpoint) liftQuota() error {
	limits, err := k.c.cgroup.Quota()
	if err != nil {
		return err
	}
	for _, l := range limits {
		entry, err := k.guard.Promise(guardian.Write(l.Path, l.Value))
		if err != nil {
			return err
		}
		k.quota = append(k.quota, lifted{entry, l})
		if err := os.WriteFile(l.Path, []byte(l.Lifted), 0); err != nil {
			return fmt.Errorf("lift the cpu quota: %w", err)
		}
	}
	return nil
}

func (k *checkpoint) restoreQuota() error {
	var errs error
	for _, q := range k.quota {
		err := os.WriteFile(q.limit.Path, []byte(q.limit.Value), 0)
		if err == nil {
			err = k.guard.Strike(q.entry)
		}
		errs = errors.Join(errs, err)
	}
	k.quota = nil
	return errs
}

// letGo lets the container run on and tells the guardian so.
func (k *checkpoint) letGo() error {
	err := k.halt.Release(context.Background())
	if err == nil {
		err = k.guard.Strike(k.thaw)
		k.thaw = 0
	}
	return err
}
