package task

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// IDMaps translate ids between the host and the container's user namespace.
// An empty map is the identity: no user namespace of its own.
type IDMaps struct{ UID, GID []image.IDMap }

// User is a host uid as the container numbers it.
func (m IDMaps) User(host uint32) uint32 { return toContainer(m.UID, host) }

// Group is a host gid likewise.
func (m IDMaps) Group(host uint32) uint32 { return toContainer(m.GID, host) }

const overflowID = 65534 // what the kernel shows for an unmapped id

func toContainer(m []image.IDMap, host uint32) uint32 {
	if len(m) == 0 {
		return host
	}
	for _, r := range m {
		if host >= r.Host && host-r.Host < r.Size {
			return r.Container + host - r.Host
		}
	}
	return overflowID
}

// Owner translates a file's owner and group as the host shows them. Ids that the
// container does not have are all ones, which chown(2) takes for "as it is".
func (m IDMaps) Owner(st *unix.Stat_t) (uid, gid uint32) {
	inside := func(ids []image.IDMap, host uint32) uint32 {
		for _, r := range ids {
			if host >= r.Host && host-r.Host < r.Size {
				return r.Container + host - r.Host
			}
		}
		if len(ids) == 0 {
			return host
		}
		return ^uint32(0)
	}
	return inside(m.UID, st.Uid), inside(m.GID, st.Gid)
}

// Credentials reads a thread's credentials but for the securebits, which only
// the thread itself can tell.
func Credentials(s *Status, maps IDMaps) image.Credentials {
	c := image.Credentials{
		Inheritable: s.CapInh, Permitted: s.CapPrm, Effective: s.CapEff,
		Bounding: s.CapBnd, Ambient: s.CapAmb, NoNewPrivs: s.NoNewPrivs,
	}
	for i := range s.UID {
		c.UID[i] = toContainer(maps.UID, s.UID[i])
		c.GID[i] = toContainer(maps.GID, s.GID[i])
	}
	for _, g := range s.Groups {
		c.Groups = append(c.Groups, toContainer(maps.GID, g))
	}
	return c
}

// lastCap is the highest capability that any record can name.
const lastCap = 63

// noSetuidFixup keeps the kernel from changing capabilities when uids change.
const noSetuidFixup = 1 << 2 // SECBIT_NO_SETUID_FIXUP

// restoreCredentials adds the calls that give a stub a thread's credentials.
// The order is forced: the inheritable set while the bounding set is whole, ids
// while CAP_SETUID is effective, ambient capabilities once ids stand, securebits
// while CAP_SETPCAP is effective, and the capabilities themselves last.
func restoreCredentials(b *tracee.Batch, c *image.Credentials, held Held) {
	full := held.Capabilities
	b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_SET_SECUREBITS), tracee.W(noSetuidFixup))
	Capset(b, full, full, c.Inheritable)
	for i := range lastCap + 1 {
		if full&(1<<i) != 0 && c.Bounding&(1<<i) == 0 {
			b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_CAPBSET_DROP), tracee.W(i))
		}
	}
	if !held.IDs {
		SetIDs(b, c)
	}
	for i := range lastCap + 1 {
		if c.Ambient&(1<<i) != 0 {
			b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_CAP_AMBIENT), tracee.W(unix.PR_CAP_AMBIENT_RAISE), tracee.W(i))
		}
	}
	b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_SET_SECUREBITS), tracee.W(c.Securebits))
	Capset(b, c.Permitted, c.Effective, c.Inheritable)
	if c.NoNewPrivs {
		b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_SET_NO_NEW_PRIVS), tracee.W(1))
	}
}

// SetIDs adds the calls that give a stub a thread's ids and groups.
func SetIDs(b *tracee.Batch, c *image.Credentials) {
	groups := make([]byte, 4*len(c.Groups))
	for i, g := range c.Groups {
		binary.LittleEndian.PutUint32(groups[4*i:], g)
	}
	b.Add(unix.SYS_SETGROUPS, tracee.W(len(c.Groups)), b.Put(groups))
	b.Add(unix.SYS_SETRESGID, tracee.W(c.GID[0]), tracee.W(c.GID[1]), tracee.W(c.GID[2]))
	b.Add(unix.SYS_SETFSGID, tracee.W(c.GID[3]))
	b.Add(unix.SYS_SETRESUID, tracee.W(c.UID[0]), tracee.W(c.UID[1]), tracee.W(c.UID[2]))
	b.Add(unix.SYS_SETFSUID, tracee.W(c.UID[3]))
}

// KeepCapabilities adds the call after which a change of ids changes no
// capabilities.
func KeepCapabilities(b *tracee.Batch) {
	b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_SET_SECUREBITS), tracee.W(noSetuidFixup))
}

// Capset adds a capset(2) of the calling thread.
func Capset(b *tracee.Batch, permitted, effective, inheritable uint64) {
	head := binary.LittleEndian.AppendUint32(nil, unix.LINUX_CAPABILITY_VERSION_3)
	head = binary.LittleEndian.AppendUint32(head, 0)
	var data []byte
	for shift := 0; shift < 64; shift += 32 {
		for _, set := range []uint64{effective, permitted, inheritable} {
			data = binary.LittleEndian.AppendUint32(data, uint32(set>>shift))
		}
	}
	b.Add(unix.SYS_CAPSET, b.Put(head), b.Put(data))
}

// Capabilities reads the effective capabilities of a task.
func Capabilities(tid int) (uint64, error) {
	s, err := ReadStatus(tid)
	if err != nil {
		return 0, fmt.Errorf("capabilities of task %d: %w", tid, err)
	}
	return s.CapEff, nil
}
