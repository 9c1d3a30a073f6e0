package image

import (
	"fmt"
	"path"
)

// The schema: every record that can stand in a stream, in one place, as
// linux-cr kept it in one header. Payloads are CBOR maps with integer keys;
// a key is never reused for another meaning, and a reader skips keys it does
// not know. docs/image.md explains each field for readers in other languages.

// Magic numbers of the first and the last record, so that a stream cut short
// or joined wrongly is seen at both ends.
const (
	HeaderMagic  uint64 = 0x00feed0cc0a2d200
	TrailerMagic uint64 = 0x002d2a0cc0deef00
)

// Revision is the format's revision. A reader accepts its own and older ones.
const Revision = 1

// Ref names an object of the stream: a descriptor table, an open file, an
// address space. Zero names nothing. The writer hands references out in
// ascending order, and an object's record stands before the first record that
// refers to it.
type Ref uint32

// Type is a record's type. The bands are linux-cr's.
type Type uint32

// Record types in the order in which they may stand in a stream.
const (
	TypeHeader     Type = 1
	TypeArch       Type = 2
	TypeContainer  Type = 3
	TypeTree       Type = 101
	TypeTask       Type = 102
	TypeNetwork    Type = 103
	TypeFile       Type = 301
	TypeFiles      Type = 302
	TypeFS         Type = 303
	TypePipe       Type = 304
	TypePty        Type = 305
	TypeInode      Type = 306
	TypeRemoved    Type = 307
	TypeMM         Type = 401
	TypeShmem      Type = 402
	TypePages      Type = 403
	TypeBytes      Type = 404
	TypeSemSet     Type = 501
	TypeMessages   Type = 502
	TypeMqueue     Type = 503
	TypeSighand    Type = 601
	TypeConnection Type = 701
	TypeQueue      Type = 702
	TypeTrailer    Type = 9001
	TypeError      Type = 9999
)

// Header opens the stream.
type Header struct {
	Magic     uint64   `cbor:"1,keyasint"`
	Revision  uint32   `cbor:"2,keyasint"`
	ByteOrder string   `cbor:"3,keyasint"` // "little"
	ID        [16]byte `cbor:"4,keyasint"` // random, unique to this image
	Time      int64    `cbor:"5,keyasint"` // CLOCK_REALTIME of the checkpoint, nanoseconds
	Uname     Uname    `cbor:"6,keyasint"`
	Tool      string   `cbor:"7,keyasint"` // program and version that wrote it
	Options   Options  `cbor:"8,keyasint"`
}

// Uname is uname(2) of the kernel the image was taken on.
type Uname struct {
	Sysname string `cbor:"1,keyasint"`
	Release string `cbor:"2,keyasint"`
	Version string `cbor:"3,keyasint"`
	Machine string `cbor:"4,keyasint"`
}

// Options are the choices of this checkpoint that restore must know.
type Options struct {
	LeaveRunning   bool `cbor:"1,keyasint,omitempty"`
	TCPEstablished bool `cbor:"2,keyasint,omitempty"`
	SkipInFlight   bool `cbor:"3,keyasint,omitempty"` // connections that no program had accepted were left out
}

// Arch describes the machine as far as the saved registers depend on it.
type Arch struct {
	Machine    string            `cbor:"1,keyasint"` // uname machine, "x86_64"
	PageSize   uint32            `cbor:"2,keyasint"`
	Features   []string          `cbor:"3,keyasint"`           // cpu flags as /proc/cpuinfo names them
	XFeatures  uint64            `cbor:"4,keyasint,omitempty"` // XCR0: components in an xsave area
	XSize      uint32            `cbor:"5,keyasint,omitempty"` // bytes of an xsave area
	VDSO       map[string]uint64 `cbor:"6,keyasint,omitempty"` // vdso symbol -> offset
	VDSOLength uint64            `cbor:"7,keyasint,omitempty"` // bytes of [vvar*] and [vdso] together

	XLayout []XComponent `cbor:"40,keyasint,omitempty"` // of an xsave area, behind its header
	Model   string       `cbor:"41,keyasint,omitempty"` // as /proc/cpuinfo names it
}

// XComponent is where one component of the extended state lies in an xsave area.
type XComponent struct {
	Number uint32 `cbor:"1,keyasint"`
	Offset uint32 `cbor:"2,keyasint"`
	Size   uint32 `cbor:"3,keyasint"`
}

// Container is what the engine knows of the container: the first content.
type Container struct {
	ID          string            `cbor:"1,keyasint"`
	Runtime     string            `cbor:"2,keyasint"` // state root it was found under
	Bundle      string            `cbor:"3,keyasint"`
	Spec        []byte            `cbor:"4,keyasint"` // the bundle's config.json, byte for byte
	Config      []byte            `cbor:"5,keyasint"` // libcontainer's configuration, JSON
	Namespaces  []Namespace       `cbor:"6,keyasint"`
	UIDMap      []IDMap           `cbor:"7,keyasint,omitempty"`
	GIDMap      []IDMap           `cbor:"8,keyasint,omitempty"`
	Cgroups     map[string]string `cbor:"9,keyasint"` // controller ("" for v2) -> path below its mount
	SubCgroups  []string          `cbor:"10,keyasint,omitempty"`
	Paused      bool              `cbor:"11,keyasint,omitempty"` // frozen by its engine when we came
	Mounts      []Mount           `cbor:"12,keyasint"`
	Hostname    string            `cbor:"13,keyasint"`
	Domainname  string            `cbor:"14,keyasint,omitempty"`
	Links       []Link            `cbor:"15,keyasint,omitempty"`
	LSM         string            `cbor:"16,keyasint,omitempty"` // /proc/PID/attr/current of init
	Stdio       []string          `cbor:"17,keyasint"`           // link targets of fds 0, 1, 2 as init was given them
	Monotonic   int64             `cbor:"18,keyasint"`           // CLOCK_MONOTONIC inside the container at the stop, nanoseconds
	Boottime    int64             `cbor:"19,keyasint"`           // CLOCK_BOOTTIME likewise
	Warnings    []string          `cbor:"20,keyasint,omitempty"` // what was left out by choice
	Annotations map[string]string `cbor:"21,keyasint,omitempty"`

	IPC       []Sysctl      `cbor:"46,keyasint,omitempty"` // limits of its ipc namespace that it has set itself
	UTS       *UTSNamespace `cbor:"41,keyasint,omitempty"` // names that the container has given itself
	Subs      []SubCgroup   `cbor:"40,keyasint,omitempty"` // cgroups that tasks have made, parents first
	Hold      string        `cbor:"22,keyasint,omitempty"` // table of nftables that holds the connections' packets off
	Unmounted []string      `cbor:"23,keyasint,omitempty"` // points of mounts of the bundle that the container has taken away
}

// SubCgroup is a cgroup below the container's own, or, with an empty Path, that
// itself, of which only what it hands on is the container's to say.
type SubCgroup struct {
	Hierarchy string       `cbor:"1,keyasint,omitempty"` // controllers as in /proc/PID/cgroup, "" for v2
	Path      string       `cbor:"2,keyasint,omitempty"` // from the container's own
	UID       uint32       `cbor:"3,keyasint,omitempty"` // of the directory, as the container's user namespace numbers it
	GID       uint32       `cbor:"4,keyasint,omitempty"`
	Mode      uint32       `cbor:"5,keyasint,omitempty"`
	Files     []CgroupFile `cbor:"6,keyasint,omitempty"`
}

// CgroupFile is a file of a cgroup: a setting, or one that has been given to
// somebody.
type CgroupFile struct {
	Name  string `cbor:"1,keyasint"`
	Set   bool   `cbor:"2,keyasint,omitempty"` // a setting, with the value
	Value string `cbor:"3,keyasint,omitempty"` // as it is read, without the last newline
	UID   uint32 `cbor:"4,keyasint,omitempty"`
	GID   uint32 `cbor:"5,keyasint,omitempty"`
	Mode  uint32 `cbor:"6,keyasint,omitempty"`
}

// Namespace is one namespace of the container.
type Namespace struct {
	Ref   Ref    `cbor:"1,keyasint"`
	Type  string `cbor:"2,keyasint"` // as under /proc/PID/ns: "mnt", "pid", ...
	Inode uint64 `cbor:"3,keyasint"`
	Path  string `cbor:"4,keyasint,omitempty"` // set where the configuration joins it by path
	Owner uint64 `cbor:"5,keyasint,omitempty"` // inode of the owning user namespace
	Host  bool   `cbor:"6,keyasint,omitempty"` // the same as the runtime's own
}

// IDMap is one line of a uid_map or gid_map.
type IDMap struct {
	Container uint32 `cbor:"1,keyasint"`
	Host      uint32 `cbor:"2,keyasint"`
	Size      uint32 `cbor:"3,keyasint"`
}

// Mount is one line of the init's mountinfo.
type Mount struct {
	ID       int    `cbor:"1,keyasint"`
	Parent   int    `cbor:"2,keyasint"`
	Root     string `cbor:"3,keyasint"`
	Point    string `cbor:"4,keyasint"`
	Options  string `cbor:"5,keyasint"`
	Optional string `cbor:"6,keyasint,omitempty"`
	FSType   string `cbor:"7,keyasint"`
	Source   string `cbor:"8,keyasint"`
	Super    string `cbor:"9,keyasint"`
	Own      string `cbor:"10,keyasint,omitempty"` // how the container has made it itself: MountNew, MountBind or MountCopy
	From     int    `cbor:"11,keyasint,omitempty"` // of a bind mount: a mount of the same file system that has Root in it; of a copy: the container's
	Space    Ref    `cbor:"12,keyasint,omitempty"` // of a new proc: the nested pid namespace that it shows, 0 for the container's
}

// Link is one network device with what is set on it.
type Link struct {
	Name      string   `cbor:"1,keyasint"`
	Type      string   `cbor:"2,keyasint"`
	Up        bool     `cbor:"3,keyasint,omitempty"`
	Addresses []string `cbor:"4,keyasint,omitempty"` // CIDR
	Routes    []string `cbor:"5,keyasint,omitempty"`
}

// Tree is the task hierarchy, parents before their children, and the namespaces
// that tasks have made themselves, owners and parents first.
type Tree struct {
	Processes  []Process         `cbor:"1,keyasint"`
	Namespaces []NestedNamespace `cbor:"2,keyasint,omitempty"`
}

// NestedNamespace is a namespace that a task of the container has made. Exactly
// the part its type needs is set.
type NestedNamespace struct {
	Ref    Ref            `cbor:"1,keyasint"`
	Type   string         `cbor:"2,keyasint"`
	Inode  uint64         `cbor:"3,keyasint"`
	Owner  Ref            `cbor:"4,keyasint"`           // the user namespace that owns it, the parent of a user namespace
	Parent Ref            `cbor:"5,keyasint,omitempty"` // of a pid namespace
	User   *UserNamespace `cbor:"6,keyasint,omitempty"`
	UTS    *UTSNamespace  `cbor:"7,keyasint,omitempty"`
	Time   *TimeNamespace `cbor:"8,keyasint,omitempty"`
	Mounts []Mount        `cbor:"12,keyasint,omitempty"` // of a mount namespace
	IPC    []Sysctl       `cbor:"14,keyasint,omitempty"` // of an ipc namespace: limits that are not those of a new one
	Dead   bool           `cbor:"11,keyasint,omitempty"` // a pid namespace whose init has ended: for children that can be no more
}

// How a mount has come about that the engine has not made.
const (
	MountNew  = "new"  // a file system mounted anew
	MountBind = "bind" // a part of one that is mounted elsewhere
	MountCopy = "copy" // in a mount namespace of a task's: it was there when that was made
)

// UserNamespace is what is set on a user namespace. Host ids of its maps are
// those of the container's user namespace.
type UserNamespace struct {
	OwnerUID  uint32  `cbor:"1,keyasint"` // the creator's, in the container's user namespace
	UIDMap    []IDMap `cbor:"2,keyasint,omitempty"`
	GIDMap    []IDMap `cbor:"3,keyasint,omitempty"`
	Setgroups bool    `cbor:"4,keyasint,omitempty"` // setgroups(2) is allowed
}

// UTSNamespace is what uname(2) says in a uts namespace.
type UTSNamespace struct {
	Hostname   string `cbor:"1,keyasint"`
	Domainname string `cbor:"2,keyasint"`
}

// TimeNamespace is what the clocks show in a time namespace at the stop,
// nanoseconds.
type TimeNamespace struct {
	Monotonic int64 `cbor:"1,keyasint"`
	Boottime  int64 `cbor:"2,keyasint"`
}

// Network is what is in a network namespace that is the container's own, or that
// a task has made. Requests are those that make it again: a message of
// rtnetlink(7) each, without its struct nlmsghdr, as the kernel's byte order has
// it. Interface numbers in them are those of Links.
type Network struct {
	Namespace  Ref         `cbor:"1,keyasint"`           // a Namespace or NestedNamespace of type "net"
	Links      []NetLink   `cbor:"2,keyasint"`           // lower devices before those on them
	Nexthops   [][]byte    `cbor:"3,keyasint,omitempty"` // RTM_NEWNEXTHOP
	Addresses  [][]byte    `cbor:"4,keyasint,omitempty"` // RTM_NEWADDR
	Routes     [][]byte    `cbor:"5,keyasint,omitempty"` // RTM_NEWROUTE
	Rules      [][]byte    `cbor:"6,keyasint,omitempty"` // RTM_NEWRULE
	Neighbours [][]byte    `cbor:"7,keyasint,omitempty"` // RTM_NEWNEIGH
	Filters    []Netfilter `cbor:"8,keyasint,omitempty"` // of nftables, in the order that makes them
	Sysctls    []Sysctl    `cbor:"9,keyasint,omitempty"`
}

// NetLink is a network device.
type NetLink struct {
	Index int32  `cbor:"1,keyasint"`
	Name  string `cbor:"2,keyasint"`
	Kind  string `cbor:"3,keyasint,omitempty"` // IFLA_INFO_KIND, or LinkLoopback
	// Outside: it is the engine's or a hook's, its other end lies outside or it
	// is a device of the machine's. It is there by then, or is not.
	Outside bool   `cbor:"4,keyasint,omitempty"`
	Flags   uint32 `cbor:"5,keyasint,omitempty"` // IFF_* that can be set
	Create  []byte `cbor:"6,keyasint,omitempty"` // attributes of the RTM_NEWLINK that makes it
	Change  []byte `cbor:"7,keyasint,omitempty"` // attributes of the one behind, when all are made
	Peer    int32  `cbor:"8,keyasint,omitempty"` // of a veth: the other end's number
	PeerNS  Ref    `cbor:"9,keyasint,omitempty"` // where that is in another namespace of the image
	Tun     *Tun   `cbor:"10,keyasint,omitempty"`
	Running bool   `cbor:"11,keyasint,omitempty"` // it carried: its other end was up
}

// LinkLoopback is the kind of the loopback device, which has none of its own.
const LinkLoopback = "loopback"

// Tun is what a tun or tap device is made from (TUNSETIFF).
type Tun struct {
	Flags   uint32 `cbor:"1,keyasint"`           // IFF_TUN or IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE
	Owner   uint32 `cbor:"2,keyasint"`           // as the container numbers users; all ones: none
	Group   uint32 `cbor:"3,keyasint"`           // likewise
	Persist bool   `cbor:"4,keyasint,omitempty"` // it stays when nobody has it open
}

// TunFile is an open /dev/net/tun: a queue of a tun or tap device, or of none yet.
type TunFile struct {
	Device  string `cbor:"1,keyasint,omitempty"` // of the container's network namespace
	Flags   uint32 `cbor:"2,keyasint,omitempty"` // TUNGETIFF
	Persist bool   `cbor:"3,keyasint,omitempty"` // the device stays when nobody has it open
	SndBuf  int32  `cbor:"4,keyasint,omitempty"` // TUNGETSNDBUF
	Header  int32  `cbor:"5,keyasint,omitempty"` // bytes of a virtio_net_hdr, TUNGETVNETHDRSZ
}

// Netfilter is a message of nftables: the number of its type and what follows its
// struct nlmsghdr.
type Netfilter struct {
	Type    uint8  `cbor:"1,keyasint"` // NFT_MSG_NEW*
	Message []byte `cbor:"2,keyasint"`
}

// Sysctl is a value below /proc/sys/net, or, of an ipc namespace, below /proc/sys.
type Sysctl struct {
	Name  string `cbor:"1,keyasint"` // "ipv4/conf/all/forwarding", "kernel/shmmax"
	Value string `cbor:"2,keyasint"`
}

// Process is one process's place in the hierarchy. Ids are those of the
// container's pid namespace, the way the container sees them.
type Process struct {
	Pid     int32   `cbor:"1,keyasint"`
	Ppid    int32   `cbor:"2,keyasint"`
	Pgid    int32   `cbor:"3,keyasint"`
	Sid     int32   `cbor:"4,keyasint"`
	Pids    []int32 `cbor:"5,keyasint"`           // pid in each namespace, outermost (the host) first
	Threads []int32 `cbor:"6,keyasint,omitempty"` // tids, leader first; none for a zombie
	Zombie  bool    `cbor:"7,keyasint,omitempty"`
	Status  uint32  `cbor:"8,keyasint,omitempty"` // wait status of a zombie
	Comm    []byte  `cbor:"9,keyasint"`
	// Namespaces are those it is in that are not init's.
	Namespaces []Ref `cbor:"10,keyasint,omitempty"`
	// Children are those that its children begin in where those are not its
	// own (pid and time), zero standing for a pid namespace not born yet.
	Children []Ref `cbor:"11,keyasint,omitempty"`
	// Inner, of a process in a nested pid namespace, are the ids there.
	Inner *InnerIDs `cbor:"12,keyasint,omitempty"`
	// Apart are the threads that are in other namespaces than their process.
	Apart []ApartThread `cbor:"13,keyasint,omitempty"`
}

// ApartThread says in which namespaces a thread is, as Process does.
type ApartThread struct {
	Tid        int32 `cbor:"1,keyasint"`
	Namespaces []Ref `cbor:"2,keyasint,omitempty"`
	Children   []Ref `cbor:"3,keyasint,omitempty"`
}

// ThreadApart is where a thread is that is elsewhere than its process, else nil.
func (p *Process) ThreadApart(tid int32) *ApartThread {
	for i := range p.Apart {
		if p.Apart[i].Tid == tid {
			return &p.Apart[i]
		}
	}
	return nil
}

// InnerIDs are ids in each pid namespace below the container's, outermost first.
type InnerIDs struct {
	Threads [][]int32 `cbor:"1,keyasint"` // of each thread, leader first; of a zombie its pid
	Pgid    []int32   `cbor:"2,keyasint"` // zero where the group is from outside
	Sid     []int32   `cbor:"3,keyasint"`
}

// Task is one process with its threads. Zombies have none.
type Task struct {
	Pid         int32        `cbor:"1,keyasint"`
	MM          Ref          `cbor:"2,keyasint"`
	Files       Ref          `cbor:"3,keyasint"`
	FS          Ref          `cbor:"4,keyasint"`
	Sighand     Ref          `cbor:"5,keyasint"`
	ExitSignal  int32        `cbor:"6,keyasint"`
	Rlimits     []Rlimit     `cbor:"7,keyasint"` // indexed by RLIMIT_*
	ITimers     []ITimer     `cbor:"8,keyasint,omitempty"`
	Timers      []PosixTimer `cbor:"9,keyasint,omitempty"`
	Pending     [][]byte     `cbor:"10,keyasint,omitempty"` // shared queue: siginfo_t of 128 bytes each, in order
	Subreaper   bool         `cbor:"11,keyasint,omitempty"`
	Dumpable    uint32       `cbor:"12,keyasint"`
	OOMScoreAdj int32        `cbor:"13,keyasint,omitempty"`
	THPDisable  uint32       `cbor:"15,keyasint,omitempty"` // as PR_GET_THP_DISABLE tells it
	Stopped     int32        `cbor:"16,keyasint,omitempty"` // the job-control signal that stopped it
	Threads     []Thread     `cbor:"17,keyasint"`           // leader first
	Untold      int32        `cbor:"18,keyasint,omitempty"` // CldStopped or CldContinued, if wait(2) has yet to tell the parent

	CoredumpFilter uint32   `cbor:"40,keyasint"`
	LoginUID       uint32   `cbor:"41,keyasint"`           // all ones: none
	MDWE           uint32   `cbor:"42,keyasint,omitempty"` // PR_GET_MDWE
	MemoryMerge    bool     `cbor:"43,keyasint,omitempty"`
	XFeatures      uint64   `cbor:"44,keyasint,omitempty"` // that it asked for, ARCH_REQ_XCOMP_PERM
	LDT            [][]byte `cbor:"45,keyasint,omitempty"` // struct user_desc each
	Membarrier     uint32   `cbor:"50,keyasint,omitempty"` // registrations, as MEMBARRIER_CMD_GET_REGISTRATIONS tells them
}

// What wait(2) tells of a child that has not ended: si_code of a SIGCHLD
// (sigaction(2)).
const (
	CldStopped   = 5
	CldContinued = 6
)

// Rlimit is one resource limit, RLIM_INFINITY being all ones.
type Rlimit struct {
	Cur uint64 `cbor:"1,keyasint"`
	Max uint64 `cbor:"2,keyasint"`
}

// ITimer is one interval timer (getitimer(2)), microseconds.
type ITimer struct {
	Which    int32 `cbor:"1,keyasint"`
	Interval int64 `cbor:"2,keyasint"`
	Value    int64 `cbor:"3,keyasint"`
}

// PosixTimer is one timer of timer_create(2), times in nanoseconds.
type PosixTimer struct {
	ID       int32  `cbor:"1,keyasint"`
	Clock    int32  `cbor:"2,keyasint"`
	Notify   int32  `cbor:"3,keyasint"`
	Signal   int32  `cbor:"4,keyasint"`
	Value    uint64 `cbor:"5,keyasint"` // sigev_value
	Tid      int32  `cbor:"6,keyasint,omitempty"`
	Interval int64  `cbor:"7,keyasint"`
	Left     int64  `cbor:"8,keyasint"`            // zero: disarmed
	Deadline int64  `cbor:"9,keyasint,omitempty"`  // by wall clock, where it was set to that
	Overrun  int64  `cbor:"10,keyasint,omitempty"` // expiries since its signal, which is pending, was queued
}

// Thread is one thread of a task.
type Thread struct {
	Tid         int32       `cbor:"1,keyasint"`
	Comm        []byte      `cbor:"2,keyasint"`
	Regs        []byte      `cbor:"3,keyasint"` // NT_PRSTATUS general registers, the architecture's layout
	XState      []byte      `cbor:"4,keyasint"` // NT_X86_XSTATE
	SigMask     uint64      `cbor:"5,keyasint"`
	RobustHead  uint64      `cbor:"6,keyasint,omitempty"`
	RobustLen   uint64      `cbor:"7,keyasint,omitempty"`
	TidAddress  uint64      `cbor:"8,keyasint,omitempty"`
	Rseq        *Rseq       `cbor:"9,keyasint,omitempty"`
	AltStack    AltStack    `cbor:"10,keyasint"`
	Creds       Credentials `cbor:"11,keyasint"`
	SeccompMode uint32      `cbor:"12,keyasint,omitempty"`
	Seccomp     []Filter    `cbor:"13,keyasint,omitempty"` // oldest first
	PDeathSig   int32       `cbor:"14,keyasint,omitempty"`
	TimerSlack  uint64      `cbor:"15,keyasint,omitempty"` // nanoseconds
	Sched       Sched       `cbor:"16,keyasint"`
	Affinity    []byte      `cbor:"17,keyasint,omitempty"` // sched_getaffinity mask
	IOPrio      int32       `cbor:"18,keyasint,omitempty"`
	Pending     [][]byte    `cbor:"19,keyasint,omitempty"` // thread-directed queue
	Restart     *Restart    `cbor:"20,keyasint,omitempty"`
	Files       Ref         `cbor:"30,keyasint,omitempty"` // not the process's but its own
	FS          Ref         `cbor:"31,keyasint,omitempty"` // likewise
	SemUndo     uint32      `cbor:"32,keyasint,omitempty"` // number of its semaphore undo list
	Vfork       int32       `cbor:"33,keyasint,omitempty"` // pid of the child for which it waits in vfork(2)
	Controls    Controls    `cbor:"40,keyasint"`
	Policy      *MemPolicy  `cbor:"41,keyasint,omitempty"` // set_mempolicy(2)
	Exited      bool        `cbor:"42,keyasint,omitempty"` // a leader that has ended while others run: it has an id, a name and credentials
	ExitCode    uint32      `cbor:"43,keyasint,omitempty"` // of such a leader, as exit_code in /proc/PID/stat

	NarrowRobust uint64 `cbor:"44,keyasint,omitempty"` // the list of robust futexes of 32-bit code, below 4 GiB

	Cgroups map[string]string `cbor:"60,keyasint,omitempty"` // by hierarchy, where it is below the container's own
}

// Controls is what prctl(2), arch_prctl(2) and ptrace(2) set for one thread
// beside its credentials. Zero is what every program starts with.
type Controls struct {
	Personality uint32    `cbor:"1,keyasint,omitempty"`
	TimerSlack  uint64    `cbor:"2,keyasint,omitempty"` // the default that PR_SET_TIMERSLACK 0 restores
	NoTSC       bool      `cbor:"3,keyasint,omitempty"` // rdtsc raises SIGSEGV
	NoCPUID     bool      `cbor:"4,keyasint,omitempty"` // cpuid raises SIGSEGV
	MCEKill     uint32    `cbor:"5,keyasint,omitempty"` // 1 early, 2 late
	IOFlusher   bool      `cbor:"6,keyasint,omitempty"`
	Speculation [3]uint32 `cbor:"7,keyasint"` // PR_GET_SPECULATION_CTRL, 0 where the thread set nothing
	Dispatch    *Dispatch `cbor:"8,keyasint,omitempty"`
	TLS         [][]byte  `cbor:"9,keyasint,omitempty"` // struct user_desc of its own segments
}

// Dispatch is PR_SET_SYSCALL_USER_DISPATCH, as ptrace(2) tells it.
type Dispatch struct {
	Mode     uint64 `cbor:"1,keyasint"`
	Selector uint64 `cbor:"2,keyasint,omitempty"`
	Offset   uint64 `cbor:"3,keyasint,omitempty"`
	Length   uint64 `cbor:"4,keyasint,omitempty"`
}

// MemPolicy says from which memory nodes pages come (set_mempolicy(2)).
type MemPolicy struct {
	Mode  uint32 `cbor:"1,keyasint"`           // MPOL_* and its flags
	Nodes []byte `cbor:"2,keyasint,omitempty"` // bit mask, little endian
}

// Rseq is a registered restartable-sequence area.
type Rseq struct {
	Addr uint64 `cbor:"1,keyasint"`
	Size uint32 `cbor:"2,keyasint"`
	Sig  uint32 `cbor:"3,keyasint"`
}

// AltStack is stack_t of sigaltstack(2).
type AltStack struct {
	SP    uint64 `cbor:"1,keyasint,omitempty"`
	Flags int32  `cbor:"2,keyasint,omitempty"`
	Size  uint64 `cbor:"3,keyasint,omitempty"`
}

// Credentials of one thread; ids as the container's user namespace numbers them.
type Credentials struct {
	UID         [4]uint32 `cbor:"1,keyasint"` // real, effective, saved, filesystem
	GID         [4]uint32 `cbor:"2,keyasint"`
	Groups      []uint32  `cbor:"3,keyasint,omitempty"`
	Inheritable uint64    `cbor:"4,keyasint,omitempty"`
	Permitted   uint64    `cbor:"5,keyasint,omitempty"`
	Effective   uint64    `cbor:"6,keyasint,omitempty"`
	Bounding    uint64    `cbor:"7,keyasint,omitempty"`
	Ambient     uint64    `cbor:"8,keyasint,omitempty"`
	Securebits  uint32    `cbor:"9,keyasint,omitempty"`
	NoNewPrivs  bool      `cbor:"10,keyasint,omitempty"`
}

// Filter is one seccomp filter: its classic BPF program and flags.
type Filter struct {
	Program []byte `cbor:"1,keyasint"` // struct sock_filter, 8 bytes each
	Flags   uint64 `cbor:"2,keyasint,omitempty"`
}

// Sched is struct sched_attr of sched_getattr(2).
type Sched struct {
	Policy   uint32 `cbor:"1,keyasint"`
	Flags    uint64 `cbor:"2,keyasint,omitempty"`
	Nice     int32  `cbor:"3,keyasint,omitempty"`
	Priority uint32 `cbor:"4,keyasint,omitempty"`
	Runtime  uint64 `cbor:"5,keyasint,omitempty"`
	Deadline uint64 `cbor:"6,keyasint,omitempty"`
	Period   uint64 `cbor:"7,keyasint,omitempty"`
	UtilMin  uint32 `cbor:"8,keyasint,omitempty"` // utilization clamps; both zero: none
	UtilMax  uint32 `cbor:"9,keyasint,omitempty"`
}

// Restart is the restart block of a call that was interrupted with
// ERESTART_RESTARTBLOCK: the kernel keeps it outside the registers.
type Restart struct {
	Nr   uint64 `cbor:"1,keyasint"` // the call it restarts, by the number it has for code like the thread's
	Left int64  `cbor:"2,keyasint"` // nanoseconds that remained, negative: for ever
}

// Sighand is a table of signal actions, shared by the threads of a process.
type Sighand struct {
	Actions []SigAction `cbor:"1,keyasint"` // only those that are not the default
}

// SigAction is the kernel's struct sigaction for one signal.
type SigAction struct {
	Signal   int32  `cbor:"1,keyasint"`
	Handler  uint64 `cbor:"2,keyasint"`
	Flags    uint64 `cbor:"3,keyasint"`
	Restorer uint64 `cbor:"4,keyasint"`
	Mask     uint64 `cbor:"5,keyasint"`
}

// FS is a task's place in the file system.
type FS struct {
	Cwd   string `cbor:"1,keyasint"`
	Root  string `cbor:"2,keyasint"`
	Umask uint32 `cbor:"3,keyasint"`
	// The directories themselves, where their paths do not name them any more.
	CwdRemoved  Ref `cbor:"4,keyasint,omitempty"`
	RootRemoved Ref `cbor:"5,keyasint,omitempty"`
	// The mounts that they are on, where others have covered their paths.
	CwdMnt  int32 `cbor:"6,keyasint,omitempty"`
	RootMnt int32 `cbor:"7,keyasint,omitempty"`
}

// Files is one descriptor table.
type Files struct {
	Descriptors []Descriptor `cbor:"1,keyasint"`
	Locks       []Lock       `cbor:"2,keyasint,omitempty"`
}

// The kinds of lock.
const (
	LockPosix = "posix" // fcntl(2), of the table
	LockOFD   = "ofd"   // fcntl(2), of the open file description
	LockFlock = "flock" // flock(2)
	LockLease = "lease" // F_SETLEASE
)

// Lock is a lock that a table has, or that its task took on an open file.
type Lock struct {
	FD    int32  `cbor:"1,keyasint"`
	Kind  string `cbor:"2,keyasint"`
	Write bool   `cbor:"3,keyasint,omitempty"`
	Start int64  `cbor:"4,keyasint,omitempty"` // first byte
	End   int64  `cbor:"5,keyasint"`           // last byte; the largest number: to the end of the file
}

// Descriptor is one number in a table.
type Descriptor struct {
	FD      int32 `cbor:"1,keyasint"`
	File    Ref   `cbor:"2,keyasint"`
	CloExec bool  `cbor:"3,keyasint,omitempty"`
}

// The kinds of open file.
const (
	KindRegular   = "regular"
	KindDirectory = "directory"
	KindDevice    = "device"
	KindPipe      = "pipe"
	KindFifo      = "fifo"
	KindEpoll     = "epoll"
	KindEventfd   = "eventfd"
	KindTimerfd   = "timerfd"
	KindSignalfd  = "signalfd"
	KindInotify   = "inotify"
	KindFanotify  = "fanotify"
	KindPidfd     = "pidfd"
	KindNamespace = "namespace"
	KindSocket    = "socket"
	KindProc      = "proc"
	KindStdio     = "stdio"
	KindShmem     = "shmem"
	KindPath      = "path"
	KindPtmx      = "ptmx"
	KindTTY       = "tty"
	KindMqueue    = "mqueue"
	KindExternal  = "external"
	KindTun       = "tun"
)

// File is one open file description; exactly the part its Kind needs is set.
type File struct {
	Kind     string    `cbor:"1,keyasint"`
	Flags    uint32    `cbor:"2,keyasint"` // open(2) flags, without O_CLOEXEC
	Pos      int64     `cbor:"3,keyasint,omitempty"`
	Path     string    `cbor:"4,keyasint,omitempty"` // inside the container's root
	Size     int64     `cbor:"5,keyasint,omitempty"` // of a regular file, at the checkpoint
	Mtime    int64     `cbor:"6,keyasint,omitempty"` // nanoseconds
	Mode     uint32    `cbor:"7,keyasint,omitempty"` // st_mode
	Rdev     uint64    `cbor:"8,keyasint,omitempty"` // of a device node
	Pipe     Ref       `cbor:"9,keyasint,omitempty"` // pipe and fifo: the buffer; shmem: the memory; ptmx and tty: the terminal; mqueue: the queue
	Stdio    int32     `cbor:"10,keyasint,omitempty"`
	Epoll    *Epoll    `cbor:"11,keyasint,omitempty"`
	Eventfd  *Eventfd  `cbor:"12,keyasint,omitempty"`
	Timerfd  *Timerfd  `cbor:"13,keyasint,omitempty"`
	Signalfd *Signalfd `cbor:"14,keyasint,omitempty"`
	Socket   *Socket   `cbor:"15,keyasint,omitempty"`
	Pid      int32     `cbor:"16,keyasint,omitempty"` // proc: the process the path is below
	Mnt      int32     `cbor:"17,keyasint,omitempty"` // id of the mount it is on, of the container or of Inside, where another has covered its path
	Opener   int32     `cbor:"18,keyasint,omitempty"` // pid of a task that holds it, whose credentials open it
	Removed  Ref       `cbor:"19,keyasint,omitempty"` // regular, directory and path: the file, where Path does not name it any more
	Owner    *Owner    `cbor:"20,keyasint,omitempty"` // who gets signals about it
	Tun      *TunFile  `cbor:"50,keyasint,omitempty"`
	Inside   Ref       `cbor:"21,keyasint,omitempty"` // the mount namespace of a task's making in which the path leads to it

	Inotify *Inotify `cbor:"30,keyasint,omitempty"`
	Gone    *Gone    `cbor:"31,keyasint,omitempty"` // pidfd and proc: the task it is about, which is gone

	Fanotify *Fanotify `cbor:"32,keyasint,omitempty"`
	Thread   int32     `cbor:"33,keyasint,omitempty"` // pidfd and proc: the thread of Pid that it is about, where it is not the first

	Reading *Reading `cbor:"34,keyasint,omitempty"` // directory: how far it has been read, where Pos may mean nothing in another

	Key string `cbor:"40,keyasint,omitempty"` // external: by which it is given anew
}

// Reading is how far an open directory has been read.
type Reading struct {
	Rest []string `cbor:"1,keyasint"` // names still to come, in their order
}

// Gone is a task that is gone and of which descriptors are left.
type Gone struct {
	Number uint32 `cbor:"1,keyasint"`           // the same in all files about it
	Pid    int32  `cbor:"2,keyasint,omitempty"` // proc: which it had
	Status uint32 `cbor:"3,keyasint,omitempty"` // pidfd: how it ended, as wait(2) tells it
}

// NamespaceLink is the name below /proc/PID/ns of an open namespace.
func (f *File) NamespaceLink() string { return path.Base(f.Path) }

// ThreadNamespacePath is the path of an open namespace that a thread is in and its
// process is not.
func ThreadNamespacePath(pid, tid int32, kind string) string {
	return fmt.Sprintf("/proc/%d/task/%d/ns/%s", pid, tid, kind)
}

// Owner is who gets signals about an open file (fcntl(2), F_SETOWN_EX).
type Owner struct {
	Type   int32 `cbor:"1,keyasint"`           // F_OWNER_*
	ID     int32 `cbor:"2,keyasint"`           // thread, process or process group; 0: nobody any more
	Signal int32 `cbor:"3,keyasint,omitempty"` // F_SETSIG
}

// Removed is a file or directory that open files, mappings and tasks still hold
// under a name that it has lost. The bytes of a regular one follow as TypeBytes
// records of the same reference in the contents section; what they leave out
// are holes.
type Removed struct {
	Path    string `cbor:"1,keyasint"` // the name it had; for an unnamed one the directory it was made in
	Mode    uint32 `cbor:"2,keyasint"` // st_mode
	UID     uint32 `cbor:"3,keyasint,omitempty"`
	GID     uint32 `cbor:"4,keyasint,omitempty"`
	Size    int64  `cbor:"5,keyasint,omitempty"`
	Mtime   int64  `cbor:"6,keyasint,omitempty"`  // nanoseconds
	Atime   int64  `cbor:"7,keyasint,omitempty"`  // nanoseconds
	Opener  int32  `cbor:"8,keyasint,omitempty"`  // pid of a task that holds it, whose credentials make it
	Unnamed bool   `cbor:"9,keyasint,omitempty"`  // open(2) with O_TMPFILE
	Link    string `cbor:"10,keyasint,omitempty"` // a name that it still has: no bytes follow
	Target  string `cbor:"11,keyasint,omitempty"` // of a symbolic link

	Xattrs []Xattr `cbor:"40,keyasint,omitempty"` // of one without Link
	Inside Ref     `cbor:"41,keyasint,omitempty"` // the mount namespace of a task in which it had its name
}

// Pipe is the buffer behind the ends of a pipe or fifo. Its bytes follow as
// TypeBytes records of the same reference in the contents section.
type Pipe struct {
	Capacity uint32 `cbor:"1,keyasint"`
	Length   uint32 `cbor:"2,keyasint"`           // bytes in it
	Path     string `cbor:"3,keyasint,omitempty"` // of a fifo
	Packet   bool   `cbor:"4,keyasint,omitempty"`

	Runs    []PipeRun `cbor:"5,keyasint,omitempty"` // what its bytes are, where some are packets
	Removed Ref       `cbor:"6,keyasint,omitempty"` // of a fifo: the file, where Path does not name it any more
}

// PipeRun is a run of the bytes in a pipe: a packet, which is read alone (O_DIRECT of
// pipe(2)), or a stream.
type PipeRun struct {
	Length uint32 `cbor:"1,keyasint"`
	Packet bool   `cbor:"2,keyasint,omitempty"`
}

// Pty is a pseudo-terminal: a master, opened as ptmx, and its slave /dev/pts/Index.
// Its bytes, Output and Input and Behind, follow as TypeBytes records of the same
// reference in the contents section.
type Pty struct {
	Index      int32     `cbor:"1,keyasint"`
	Console    bool      `cbor:"2,keyasint,omitempty"`  // the container's own terminal: its master is the engine's
	HungUp     bool      `cbor:"3,keyasint,omitempty"`  // its master is closed
	Termios    []byte    `cbor:"4,keyasint,omitempty"`  // struct termios2, not of one that is hung up
	Winsize    [4]uint16 `cbor:"5,keyasint"`            // rows, columns, and both in pixels
	Locked     bool      `cbor:"6,keyasint,omitempty"`  // TIOCSPTLCK: the slave cannot be opened
	Packet     bool      `cbor:"7,keyasint,omitempty"`  // TIOCPKT
	Exclusive  bool      `cbor:"8,keyasint,omitempty"`  // TIOCEXCL
	Closed     bool      `cbor:"9,keyasint,omitempty"`  // the slave has been open and is not
	Session    int32     `cbor:"10,keyasint,omitempty"` // whose controlling terminal it is; its id is its leader's pid
	Foreground int32     `cbor:"11,keyasint,omitempty"` // process group
	Without    []int32   `cbor:"12,keyasint,omitempty"` // pids in the session that have given it up (TIOCNOTTY)
	Mode       uint32    `cbor:"13,keyasint"`           // of the slave's node
	UID        uint32    `cbor:"14,keyasint,omitempty"`
	GID        uint32    `cbor:"15,keyasint,omitempty"`
	Output     uint32    `cbor:"16,keyasint,omitempty"` // bytes that wait to be read from the master
	Input      uint32    `cbor:"17,keyasint,omitempty"` // from the slave
	Behind     uint32    `cbor:"18,keyasint,omitempty"` // behind those, as they were written to the master
	Ends       []byte    `cbor:"19,keyasint,omitempty"` // a bit for each byte of Input: it ends a line
}

// Inode is a file in one of the container's own file systems in memory (tmpfs),
// or one that it has changed in its root file system. Its bytes follow as
// TypeBytes records of the same reference in the contents section, holes left
// out.
type Inode struct {
	Point  string  `cbor:"1,keyasint,omitempty"` // of a root: where the file system is mounted
	Names  []Name  `cbor:"2,keyasint,omitempty"` // of all others: where it stands, hard links included
	Mode   uint32  `cbor:"3,keyasint"`           // st_mode
	UID    uint32  `cbor:"4,keyasint,omitempty"` // as the container's user namespace numbers them
	GID    uint32  `cbor:"5,keyasint,omitempty"`
	Rdev   uint64  `cbor:"6,keyasint,omitempty"` // of a device node
	Size   uint64  `cbor:"7,keyasint,omitempty"` // of a regular file
	Target string  `cbor:"8,keyasint,omitempty"` // of a symbolic link
	Atime  int64   `cbor:"9,keyasint"`           // nanoseconds
	Mtime  int64   `cbor:"10,keyasint"`
	Xattrs []Xattr `cbor:"11,keyasint,omitempty"`
	Mnt    int32   `cbor:"12,keyasint,omitempty"` // of a root: id of the mount, where the container has made it itself

	// Of directories in the root file system: what else stands in a merged one
	// stays, but for the names that are gone. All others hold what the image has.
	Merged bool     `cbor:"40,keyasint,omitempty"`
	Gone   []string `cbor:"41,keyasint,omitempty"`
}

// Name is an entry of a directory.
type Name struct {
	Dir  Ref    `cbor:"1,keyasint"` // the directory's inode
	Name string `cbor:"2,keyasint"`
}

// Xattr is an extended attribute (xattr(7)).
type Xattr struct {
	Name  string `cbor:"1,keyasint"`
	Value []byte `cbor:"2,keyasint,omitempty"`
}

// Epoll is an interest list.
type Epoll struct {
	Entries  []EpollEntry `cbor:"1,keyasint"`
	BusyPoll []byte       `cbor:"2,keyasint,omitempty"` // struct epoll_params, where anything is set in it
}

// EpollEntry is one registration: the number it was made under and the file
// behind it, which need not be open under that number any more.
type EpollEntry struct {
	FD     int32  `cbor:"1,keyasint"`
	File   Ref    `cbor:"2,keyasint"`
	Events uint32 `cbor:"3,keyasint"`
	Data   uint64 `cbor:"4,keyasint"`
}

// Eventfd is the state of an eventfd(2).
type Eventfd struct {
	Count     uint64 `cbor:"1,keyasint"`
	Semaphore bool   `cbor:"2,keyasint,omitempty"`
}

// Timerfd is the state of a timerfd(2), times in nanoseconds.
type Timerfd struct {
	Clock    int32  `cbor:"1,keyasint"`
	Ticks    uint64 `cbor:"2,keyasint,omitempty"` // expirations not yet read
	Flags    uint32 `cbor:"3,keyasint,omitempty"` // TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET
	Left     int64  `cbor:"4,keyasint,omitempty"`
	Interval int64  `cbor:"5,keyasint,omitempty"`
}

// Signalfd is the state of a signalfd(2).
type Signalfd struct {
	Mask uint64 `cbor:"1,keyasint"`
}

// Inotify is an inotify(7) instance.
type Inotify struct {
	Watches  []Watch `cbor:"1,keyasint"`
	Overflow bool    `cbor:"2,keyasint,omitempty"` // events waited to be read: an overflow takes their place
	Next     int32   `cbor:"3,keyasint,omitempty"` // number of the next watch
}

// Watch is one file that is watched.
type Watch struct {
	WD     int32  `cbor:"1,keyasint"` // watch descriptor
	Mask   uint32 `cbor:"2,keyasint"` // IN_*
	Path   string `cbor:"3,keyasint,omitempty"`
	Object Ref    `cbor:"4,keyasint,omitempty"` // the file, where it has no path: a Removed or a File
}

// Fanotify is a fanotify(7) group.
type Fanotify struct {
	Flags      uint32 `cbor:"1,keyasint"`           // of fanotify_init(2)
	EventFlags uint32 `cbor:"2,keyasint,omitempty"` // likewise
	Marks      []Mark `cbor:"3,keyasint,omitempty"`
}

// Mark is what a fanotify group watches: a file, a mount or a file system.
type Mark struct {
	Flags   uint32 `cbor:"1,keyasint,omitempty"` // FAN_MARK_*: what it is on, and how it ignores
	Mask    uint64 `cbor:"2,keyasint,omitempty"` // FAN_*
	Ignored uint64 `cbor:"3,keyasint,omitempty"` // likewise
	Path    string `cbor:"4,keyasint,omitempty"`
	Object  Ref    `cbor:"5,keyasint,omitempty"` // the file, where it has no path: a Removed or a File
}

// Socket is a socket. How sockets of the container are connected to each other
// stands in Connection records, what is unread in them in Queue records.
type Socket struct {
	Family    int32       `cbor:"1,keyasint"`
	Type      int32       `cbor:"2,keyasint"`
	Protocol  int32       `cbor:"3,keyasint,omitempty"`
	Address   []byte      `cbor:"4,keyasint,omitempty"` // struct sockaddr of getsockname(2)
	Listening bool        `cbor:"5,keyasint,omitempty"`
	Backlog   int32       `cbor:"6,keyasint,omitempty"`
	Options   []SocketOpt `cbor:"7,keyasint,omitempty"`
	Path      string      `cbor:"8,keyasint,omitempty"` // unix: the socket's file
	Mode      uint32      `cbor:"9,keyasint,omitempty"` // unix: that file's mode
	UID       uint32      `cbor:"10,keyasint,omitempty"`
	GID       uint32      `cbor:"11,keyasint,omitempty"`
	Unix      *UnixState  `cbor:"12,keyasint,omitempty"`
	TCP       *TCP        `cbor:"30,keyasint,omitempty"` // of a TCP socket that has, or had, a peer

	Peer      []byte         `cbor:"40,keyasint,omitempty"` // of others: struct sockaddr of getpeername(2)
	Groups    []SocketGroup  `cbor:"41,keyasint,omitempty"` // memberships
	Devices   []SocketDevice `cbor:"42,keyasint,omitempty"` // names of the devices whose numbers stand in the fields and options of this socket
	Datagrams []Datagram     `cbor:"43,keyasint,omitempty"` // that wait to be read, in order
	Fanout    uint32         `cbor:"44,keyasint,omitempty"` // packet: PACKET_FANOUT
	Lost      bool           `cbor:"45,keyasint,omitempty"` // netlink: messages were lost, of which ENOBUFS tells
}

// SocketGroup is a membership of a socket.
type SocketGroup struct {
	Device  int32    `cbor:"1,keyasint,omitempty"`
	Address []byte   `cbor:"2,keyasint,omitempty"` // internet: struct sockaddr of the group; packet: a hardware address
	Type    uint32   `cbor:"3,keyasint,omitempty"` // packet: PACKET_MR_*; netlink: the group
	Only    bool     `cbor:"4,keyasint,omitempty"` // internet: what Sources send and nothing else, instead of all but that
	Sources [][]byte `cbor:"5,keyasint,omitempty"` // struct sockaddr
}

// SocketDevice is a network device by its number and name.
type SocketDevice struct {
	Index int32  `cbor:"1,keyasint"`
	Name  string `cbor:"2,keyasint"`
}

// Datagram is one that waits in a socket of UDP.
type Datagram struct {
	From    []byte `cbor:"1,keyasint"`           // struct sockaddr
	To      []byte `cbor:"2,keyasint,omitempty"` // address it was sent to, 4 or 16 bytes, if the program can ask for it
	Device  int32  `cbor:"3,keyasint,omitempty"` // it came in by, likewise
	Data    []byte `cbor:"4,keyasint,omitempty"`
	TTL     uint8  `cbor:"5,keyasint,omitempty"`
	Service uint8  `cbor:"6,keyasint,omitempty"` // type of service, traffic class
}

// UnixState is what a unix socket has besides (unix(7)).
type UnixState struct {
	// Creds are what getsockopt(2) SO_PEERCRED tells: of a listening socket,
	// who listens.
	Creds    *PeerCreds `cbor:"1,keyasint,omitempty"`
	Shutdown uint8      `cbor:"2,keyasint,omitempty"` // 1: receives no more; 2: sends no more
	Reset    bool       `cbor:"3,keyasint,omitempty"` // ECONNRESET is to be told
	// Peer is the struct sockaddr of getpeername(2) where the other end has
	// none that holds it.
	Peer []byte `cbor:"4,keyasint,omitempty"`
	// Reconnect: the other end is outside the container, and Peer its path.
	Reconnect bool `cbor:"5,keyasint,omitempty"`
}

// PeerCreds are the credentials of a process, as the container numbers them.
type PeerCreds struct {
	Pid    int32    `cbor:"1,keyasint,omitempty"` // 0: outside, or not known any more
	UID    uint32   `cbor:"2,keyasint,omitempty"`
	GID    uint32   `cbor:"3,keyasint,omitempty"`
	Groups []uint32 `cbor:"4,keyasint,omitempty"`
}

// Connection says that one unix socket has another as its peer.
type Connection struct {
	From Ref `cbor:"1,keyasint,omitempty"` // a File: who connected, or an end of a pair; 0: it is closed
	To   Ref `cbor:"2,keyasint,omitempty"` // a File: its peer, or who has yet to accept it; 0: it is closed
	// Mutual: the other one has it as its peer too.
	Mutual bool `cbor:"3,keyasint,omitempty"`
}

// Queue is what is unread in a socket, the oldest first. The bytes follow as
// TypeBytes records of the same reference in the contents section.
type Queue struct {
	Socket Ref `cbor:"1,keyasint"` // a File
	// Sent: the socket has sent it, and who will accept its connection reads it.
	Sent     bool     `cbor:"2,keyasint,omitempty"`
	Messages []Unread `cbor:"3,keyasint"`
}

// Unread is a message, or a stretch of a stream, in the queue of a socket.
type Unread struct {
	Size  uint32     `cbor:"1,keyasint,omitempty"` // bytes
	Name  []byte     `cbor:"2,keyasint,omitempty"` // struct sockaddr of the sender
	From  Ref        `cbor:"3,keyasint,omitempty"` // a File: the sender, if the container still has it
	Creds *PeerCreds `cbor:"4,keyasint,omitempty"` // SCM_CREDENTIALS
	Files []Ref      `cbor:"5,keyasint,omitempty"` // SCM_RIGHTS: Files
	OOB   bool       `cbor:"6,keyasint,omitempty"` // out-of-band byte
}

// TCP is a connection, as TCP_REPAIR takes it apart and puts it together. The
// bytes of its queues follow as TypeBytes records of the reference of its open
// file in the contents section, those to be read first.
type TCP struct {
	State        uint8     `cbor:"1,keyasint"`           // TCP_* of include/net/tcp_states.h; TCP_CLOSE: it has ended
	Peer         []byte    `cbor:"2,keyasint,omitempty"` // struct sockaddr of getpeername(2)
	Receive      Stream    `cbor:"3,keyasint"`
	Send         Stream    `cbor:"4,keyasint"`
	Unsent       uint32    `cbor:"5,keyasint,omitempty"` // bytes at the end of Send that have never been sent
	MSS          uint32    `cbor:"6,keyasint,omitempty"` // what the peer takes
	Agreed       uint8     `cbor:"7,keyasint,omitempty"` // bits of tcpi_options: 1 timestamps, 2 SACK, 4 window scale
	SendScale    uint8     `cbor:"8,keyasint,omitempty"`
	ReceiveScale uint8     `cbor:"9,keyasint,omitempty"`
	Timestamp    uint32    `cbor:"10,keyasint,omitempty"` // TCP_TIMESTAMP
	Window       [5]uint32 `cbor:"11,keyasint"`           // struct tcp_repair_window
	Buffers      [2]uint32 `cbor:"12,keyasint"`           // SO_SNDBUF and SO_RCVBUF as they are
	ShutRead     bool      `cbor:"13,keyasint,omitempty"` // shutdown(2) with SHUT_RD
	Error        int32     `cbor:"14,keyasint,omitempty"` // SO_ERROR of one that has ended
}

// Stream is one direction of a connection.
type Stream struct {
	Seq   uint32 `cbor:"1,keyasint"`           // sequence number of its first byte, or the next one
	Bytes uint32 `cbor:"2,keyasint,omitempty"` // in the queue
}

// SocketOpt is one setsockopt(2).
type SocketOpt struct {
	Level int32  `cbor:"1,keyasint"`
	Name  int32  `cbor:"2,keyasint"`
	Value []byte `cbor:"3,keyasint"`
}

// MM is one address space. Its pages follow as TypePages records of the same
// reference in the contents section.
type MM struct {
	Areas  []Area     `cbor:"1,keyasint"`
	Layout [11]uint64 `cbor:"2,keyasint"` // struct prctl_mm_map, start_code to env_end
	Auxv   []byte     `cbor:"3,keyasint"`
	Exe    Ref        `cbor:"4,keyasint"`
	// LockFuture holds MCL_FUTURE and MCL_ONFAULT where mlockall(2) has set them.
	LockFuture uint32 `cbor:"5,keyasint,omitempty"`
	// Donor is the address space with which this one shares pages until one of
	// them is written to, as fork(2) leaves them: its Borrowed runs.
	Donor Ref `cbor:"6,keyasint,omitempty"`
}

// The kinds of area.
const (
	AreaAnon  = "anon"  // private anonymous memory
	AreaFile  = "file"  // a file, private or shared
	AreaShmem = "shmem" // shared anonymous memory
	AreaVDSO  = "vdso"  // [vdso] and the [vvar]s before it
	AreaAIO   = "aio"   // the ring of a context of io_setup(2)

	AreaVDSO32 = "vdso32" // the same of 32-bit programs
)

// VDSO reports code of the kernel's, which it maps itself.
func (a *Area) VDSO() bool { return a.Kind == AreaVDSO || a.Kind == AreaVDSO32 }

// Area is one mapping.
type Area struct {
	Start  uint64   `cbor:"1,keyasint"`
	End    uint64   `cbor:"2,keyasint"`
	Kind   string   `cbor:"3,keyasint"`
	Prot   uint32   `cbor:"4,keyasint"`           // PROT_*
	Shared bool     `cbor:"5,keyasint,omitempty"` // MAP_SHARED
	File   Ref      `cbor:"6,keyasint,omitempty"` // AreaFile: TypeFile; AreaShmem: TypeShmem
	Offset uint64   `cbor:"7,keyasint,omitempty"`
	Name   string   `cbor:"8,keyasint,omitempty"` // as in /proc/PID/maps
	Flags  []string `cbor:"9,keyasint,omitempty"` // VmFlags of /proc/PID/smaps that must be made again
	// HugePage is the size of its pages where they are hugetlb's, else 0.
	HugePage uint64 `cbor:"10,keyasint,omitempty"`

	Policy *MemPolicy `cbor:"40,keyasint,omitempty"` // mbind(2)
	AIO    *AIO       `cbor:"41,keyasint,omitempty"` // AreaAIO
}

// AIO is a context of io_setup(2), none of whose requests is under way.
type AIO struct {
	// Requests is for how many it was made; 0 for the ring of a parent's context,
	// which a process has by fork(2) and cannot use.
	Requests uint32 `cbor:"1,keyasint,omitempty"`
	Head     uint32 `cbor:"2,keyasint,omitempty"` // the next event to be read
	Tail     uint32 `cbor:"3,keyasint,omitempty"` // the next to be written
	Events   []byte `cbor:"4,keyasint,omitempty"` // struct io_event each, from Head on
}

// The sizes of struct aio_ring, behind which events stand, and struct io_event.
const (
	AIOHeader = 32
	AIOEvent  = 32
)

// AIOPlaces is how many events a ring of so many bytes has places for. One of
// them stays empty.
func AIOPlaces(size uint64) uint64 { return (size - AIOHeader) / AIOEvent }

// Shmem is shared anonymous memory. Its pages follow as TypePages records of
// the same reference, addresses being offsets.
type Shmem struct {
	Size  uint64 `cbor:"1,keyasint"`
	Name  string `cbor:"2,keyasint,omitempty"` // of a memfd
	Memfd bool   `cbor:"3,keyasint,omitempty"`
	Seals uint32 `cbor:"4,keyasint,omitempty"`
	Mode  uint32 `cbor:"5,keyasint,omitempty"`
	// HugePage is the size of its pages where they are hugetlb's, else 0.
	HugePage uint64 `cbor:"6,keyasint,omitempty"`
	// Path is set for a file of a tmpfs in the container that was removed and
	// lives on as shared memory.
	Path string `cbor:"7,keyasint,omitempty"`
	// SysV is set for a System V segment.
	SysV *SysVSegment `cbor:"8,keyasint,omitempty"`
}

// IPCPerm is who a System V object belongs to (ipc_perm of svipc(7)); ids of
// users as the container's user namespace numbers them.
type IPCPerm struct {
	ID   int32  `cbor:"1,keyasint"`
	Key  int32  `cbor:"2,keyasint,omitempty"` // 0: IPC_PRIVATE
	UID  uint32 `cbor:"3,keyasint,omitempty"`
	GID  uint32 `cbor:"4,keyasint,omitempty"`
	CUID uint32 `cbor:"5,keyasint,omitempty"` // creator
	CGID uint32 `cbor:"6,keyasint,omitempty"`
	Mode uint32 `cbor:"7,keyasint,omitempty"` // nine permission bits
	NS   Ref    `cbor:"8,keyasint,omitempty"` // the ipc namespace, where that is not the container's own
}

// SysVSegment is what a System V segment has besides its memory (shmget(2)).
type SysVSegment struct {
	Perm    IPCPerm `cbor:"1,keyasint"`
	Removed bool    `cbor:"2,keyasint,omitempty"` // SHM_DEST: it goes with its last user
	Locked  bool    `cbor:"3,keyasint,omitempty"` // SHM_LOCKED
}

// SemSet is a System V semaphore set (semget(2)).
type SemSet struct {
	Perm   IPCPerm   `cbor:"1,keyasint"`
	Values []uint16  `cbor:"2,keyasint"`
	Undo   []SemUndo `cbor:"3,keyasint,omitempty"`
}

// SemUndo is what is added to a semaphore when the last thread of an undo list
// ends (SEM_UNDO of semop(2)).
type SemUndo struct {
	List   uint32 `cbor:"1,keyasint"` // Thread.SemUndo
	Number uint16 `cbor:"2,keyasint"` // in the set
	Adjust int16  `cbor:"3,keyasint"`
}

// Messages is a System V message queue (msgget(2)). The texts of its messages
// follow, one after another, as TypeBytes records of the same reference.
type Messages struct {
	Perm     IPCPerm   `cbor:"1,keyasint"`
	MaxBytes uint64    `cbor:"2,keyasint"` // msg_qbytes
	Messages []Message `cbor:"3,keyasint,omitempty"`
}

// Message is one message of a queue, the oldest first.
type Message struct {
	Type int64  `cbor:"1,keyasint"`
	Size uint32 `cbor:"2,keyasint,omitempty"`
}

// Mqueue is a POSIX message queue (mq_overview(7)). The texts of its messages
// follow, one after another, as TypeBytes records of the same reference.
type Mqueue struct {
	Name     string        `cbor:"1,keyasint"`           // without the slash
	Removed  bool          `cbor:"2,keyasint,omitempty"` // it has lost its name, and goes with its last descriptor
	NS       Ref           `cbor:"3,keyasint,omitempty"` // the ipc namespace, where that is not the container's own
	UID      uint32        `cbor:"4,keyasint,omitempty"` // as the container's user namespace numbers them
	GID      uint32        `cbor:"5,keyasint,omitempty"`
	Mode     uint32        `cbor:"6,keyasint,omitempty"`
	Creator  uint32        `cbor:"7,keyasint,omitempty"` // uid whose RLIMIT_MSGQUEUE it counts against
	MaxCount uint32        `cbor:"8,keyasint"`           // mq_maxmsg
	MaxSize  uint32        `cbor:"9,keyasint"`           // mq_msgsize
	Messages []MqueueText  `cbor:"10,keyasint,omitempty"`
	Notify   *MqueueNotify `cbor:"11,keyasint,omitempty"`
	Atime    int64         `cbor:"12,keyasint"` // nanoseconds
	Mtime    int64         `cbor:"13,keyasint"`
}

// MqueueText is one message, in the order in which they will be received.
type MqueueText struct {
	Priority uint32 `cbor:"1,keyasint,omitempty"`
	Size     uint32 `cbor:"2,keyasint,omitempty"`
}

// MqueueNotify is what mq_notify(3) has registered.
type MqueueNotify struct {
	Pid    int32  `cbor:"1,keyasint"`
	Method int32  `cbor:"2,keyasint,omitempty"` // SIGEV_SIGNAL or SIGEV_NONE
	Signal int32  `cbor:"3,keyasint,omitempty"`
	Value  uint64 `cbor:"4,keyasint,omitempty"` // sigev_value
}

// Pages heads a TypePages record: the runs whose pages follow raw, in order.
type Pages struct {
	Runs []Run `cbor:"1,keyasint"`
}

// Run is a stretch of pages. Zero runs have no bytes in the stream: they read
// as zero but must be present, because a file lies under them. Neither have
// Guard runs, which nobody may touch (MADV_GUARD_INSTALL of madvise(2)), and
// Borrowed ones, which are the donor's pages at the same addresses.
type Run struct {
	Addr  uint64 `cbor:"1,keyasint"`
	Count uint32 `cbor:"2,keyasint"` // pages
	Zero  bool   `cbor:"3,keyasint,omitempty"`
	Guard bool   `cbor:"4,keyasint,omitempty"`

	Borrowed bool `cbor:"5,keyasint,omitempty"`
}

// Stored reports a run whose pages stand in the stream.
func (r Run) Stored() bool { return !r.Zero && !r.Guard && !r.Borrowed }

// Bytes heads a TypeBytes record: where in the object its raw bytes begin.
type Bytes struct {
	Offset uint64 `cbor:"1,keyasint"`
}

// Trailer closes a good stream.
type Trailer struct {
	Magic   uint64          `cbor:"1,keyasint"`
	Records uint64          `cbor:"2,keyasint"` // before this one
	Bytes   uint64          `cbor:"3,keyasint"` // before this one
	Counts  map[Type]uint64 `cbor:"4,keyasint"` // records by type
	Pages   uint64          `cbor:"5,keyasint"` // pages stored raw
	Digest  []byte          `cbor:"6,keyasint"` // SHA-256 over every earlier record's pre-header and CRC
	Late    []Late          `cbor:"7,keyasint,omitempty"`
}

// Late are signals that somebody sent while the stream was written, after the
// record of their task: a reader finds them at the end of its queues.
type Late struct {
	Pid     int32    `cbor:"1,keyasint"`
	Tid     int32    `cbor:"2,keyasint,omitempty"` // zero: for the process
	Pending [][]byte `cbor:"3,keyasint"`           // siginfo_t of 128 bytes each, in order
}

// Error is the last record of a stream whose checkpoint failed.
type Error struct {
	Phase  string `cbor:"1,keyasint"`
	Task   string `cbor:"2,keyasint,omitempty"`
	Object string `cbor:"3,keyasint,omitempty"`
	Cause  string `cbor:"4,keyasint"`
	Remedy string `cbor:"5,keyasint,omitempty"`
}
