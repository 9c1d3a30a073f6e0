package image

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Bounds of System V objects, each the kernel's own (svipc(7)).
const (
	maxSemaphores = 32000   // SEMMSL
	maxSemaphore  = 32767   // SEMVMX
	maxMessages   = 1 << 20 // no more than a record can hold
	maxMessage    = 64 << 20

	ipcShm, ipcSem, ipcMsg = "segment", "semaphore set", "message queue"
)

// ipcName is an id or a key of a kind of System V objects in an ipc namespace.
type ipcName struct {
	ns    Ref
	what  string
	value int32
}

// checkPerm checks what all System V objects have, and that no two of a kind
// have one id or key.
func (b *builder) checkPerm(kind string, p *IPCPerm) error {
	switch {
	case p.ID < 0:
		return fmt.Errorf("a %s with id %d", kind, p.ID)
	case p.Mode > 0o777:
		return fmt.Errorf("a %s of mode %#o", kind, p.Mode)
	case p.NS != 0 && !b.isIPC(p.NS):
		return fmt.Errorf("reference %d names no ipc namespace that a task has made", p.NS)
	case b.ipc[ipcName{p.NS, kind + " id", p.ID}]:
		return fmt.Errorf("two %ss with id %d", kind, p.ID)
	case p.Key != 0 && b.ipc[ipcName{p.NS, kind + " key", p.Key}]:
		return fmt.Errorf("two %ss with key %#x", kind, p.Key)
	}
	return nil
}

// keepIPC takes note of the id and key of a checked object.
func (b *builder) keepIPC(v any) {
	kind, p := "", (*IPCPerm)(nil)
	switch v := v.(type) {
	case *Shmem:
		if v.SysV == nil {
			return
		}
		kind, p = ipcShm, &v.SysV.Perm
	case *SemSet:
		kind, p = ipcSem, &v.Perm
	case *Messages:
		kind, p = ipcMsg, &v.Perm
	}
	b.ipc[ipcName{p.NS, kind + " id", p.ID}], b.ipc[ipcName{p.NS, kind + " key", p.Key}] = true, true
}

// isIPC reports a reference of an ipc namespace that a task has made.
func (b *builder) isIPC(ref Ref) bool {
	ns := b.Nested(ref)
	return ns != nil && ns.Type == "ipc"
}

// IPCSysctls are the limits of an ipc namespace (proc_sys_kernel(5),
// mq_overview(7)), as Sysctl names them.
var IPCSysctls = []string{
	"kernel/shmmax", "kernel/shmall", "kernel/shmmni", "kernel/shm_rmid_forced", "kernel/msgmax", "kernel/msgmnb", "kernel/msgmni", "kernel/sem",
	"fs/mqueue/queues_max", "fs/mqueue/msg_max", "fs/mqueue/msgsize_max", "fs/mqueue/msg_default", "fs/mqueue/msgsize_default",
}

// checkLimits checks the limits of an ipc namespace: numbers, kernel.sem having
// four of them.
func checkLimits(all []Sysctl) error {
	seen := map[string]bool{}
	for _, s := range all {
		fields := strings.Fields(s.Value)
		digits := !slices.ContainsFunc(fields, func(f string) bool { _, err := strconv.ParseUint(f, 10, 64); return err != nil })
		if !slices.Contains(IPCSysctls, s.Name) || seen[s.Name] || !digits || len(fields) == 0 || len(fields) > 4 {
			return fmt.Errorf("%s is no limit of an ipc namespace, or set twice, or to %s", quote(s.Name), quote(s.Value))
		}
		seen[s.Name] = true
	}
	return nil
}

func (b *builder) checkSemaphores(s *SemSet) error {
	if len(s.Values) == 0 || len(s.Values) > maxSemaphores {
		return fmt.Errorf("a set of %d semaphores", len(s.Values))
	}
	for i, v := range s.Values {
		if v > maxSemaphore {
			return fmt.Errorf("semaphore %d has the value %d", i, v)
		}
	}
	seen := map[SemUndo]bool{}
	for _, u := range s.Undo {
		at := SemUndo{List: u.List, Number: u.Number}
		if u.List == 0 || int(u.Number) >= len(s.Values) || seen[at] {
			return fmt.Errorf("the adjustment of semaphore %d by undo list %d is not valid", u.Number, u.List)
		}
		seen[at] = true
	}
	return b.checkPerm(ipcSem, &s.Perm)
}

func (b *builder) checkMessages(q *Messages) error {
	if len(q.Messages) > maxMessages {
		return fmt.Errorf("a queue of %d messages", len(q.Messages))
	}
	for _, m := range q.Messages {
		if m.Type <= 0 || m.Size > maxMessage {
			return errors.New("a message of a type that is not positive, or too long")
		}
	}
	return b.checkPerm(ipcMsg, &q.Perm)
}

// Bytes is the length of all messages together.
func (q *Messages) Bytes() (n uint64) {
	for _, m := range q.Messages {
		n += uint64(m.Size)
	}
	return n
}

// Bounds of POSIX message queues (include/linux/ipc_namespace.h, mq_send(3)).
const (
	maxQueueCount = 65536    // HARD_MSGMAX
	maxQueueSize  = 16 << 20 // HARD_MSGSIZEMAX
	maxPriority   = 32767    // MQ_PRIO_MAX - 1

)

// queueName is a name in an ipc namespace.
type queueName struct {
	ns   Ref
	name string
}

func (b *builder) checkMqueue(q *Mqueue) error {
	switch {
	case q.Name == "" || len(q.Name) > maxName || q.Name == "." || q.Name == ".." || strings.Contains(q.Name, "/"):
		return fmt.Errorf("a message queue cannot be called %s", quote(q.Name))
	case !q.Removed && b.mqueues[queueName{q.NS, q.Name}]:
		return fmt.Errorf("two message queues are called %s", quote(q.Name))
	case q.Mode&^0o7777 != 0:
		return fmt.Errorf("a message queue of mode %#o", q.Mode)
	case q.MaxCount == 0 || q.MaxCount > maxQueueCount || q.MaxSize == 0 || q.MaxSize > maxQueueSize:
		return fmt.Errorf("a message queue for %d messages of %d bytes", q.MaxCount, q.MaxSize)
	case len(q.Messages) > int(q.MaxCount):
		return fmt.Errorf("a queue for %d messages holds %d", q.MaxCount, len(q.Messages))
	}
	if q.NS != 0 && !b.isIPC(q.NS) {
		return fmt.Errorf("reference %d names no ipc namespace that a task has made", q.NS)
	}
	highest := uint32(maxPriority)
	for _, m := range q.Messages {
		if m.Priority > highest || m.Size > q.MaxSize {
			return fmt.Errorf("a message of priority %d and %d bytes is out of place", m.Priority, m.Size)
		}
		highest = m.Priority
	}
	if n := q.Notify; n != nil && (n.Pid <= 0 || !validSignal(n.Signal) || n.Method < 0 || n.Method > sigevNone) {
		return fmt.Errorf("process %d is to be told by method %d with signal %d", n.Pid, n.Method, n.Signal)
	}
	return nil
}

func (b *builder) keepMqueue(q *Mqueue) {
	if !q.Removed {
		b.mqueues[queueName{q.NS, q.Name}] = true
	}
}

// checkNotified checks that who waits to be told of a message is there.
func (b *builder) checkNotified() error {
	for ref, o := range b.Objects {
		if q, ok := o.(*Mqueue); ok && q.Notify != nil && b.tasks[q.Notify.Pid] == nil {
			return fmt.Errorf("message queue #%d tells process %d, which is not there", ref, q.Notify.Pid)
		}
	}
	return nil
}

// Bytes is the length of all messages together.
func (q *Mqueue) Bytes() (n uint64) {
	for _, m := range q.Messages {
		n += uint64(m.Size)
	}
	return n
}
