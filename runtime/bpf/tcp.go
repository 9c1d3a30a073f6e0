package bpf

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// passing are the members of a socket of TCP in the kernel that change as it is used,
// or are of this one socket, and that are behind no option of a socket: addresses,
// queues, locks, timers, numbers and estimates of what goes over the wire. A member
// that a kernel does not have is none. What stands in no line here, on any kernel, is
// held to be an option. (SO_INCOMING_CPU and IPV6_UNICAST_HOPS do depend on some of
// them; who asks must look at these himself.)
var passing = map[string][]string{
	"sock_common": {
		"skc_addrpair", "skc_hash", "skc_portpair", "skc_portaddr_node", "skc_v6_daddr", "skc_v6_rcv_saddr", "skc_cookie",
		"skc_nulls_node", "skc_tx_queue_mapping", "skc_rx_queue_mapping", "skc_tw_rcv_nxt", "skc_refcnt", "skc_tw_snd_nxt",
	},
	"sock": {
		"sk_rx_dst", "sk_rx_dst_ifindex", "sk_rx_dst_cookie", "sk_dst_cache", "sk_dst_pending_confirm", "sk_lock", "sk_error_queue",
		"sk_receive_queue", "sk_write_queue", "sk_backlog", "tcp_rtx_queue", "sk_send_head", "sk_forward_alloc", "sk_wmem_queued",
		"sk_wmem_alloc", "sk_rcvbuf", "sk_sndbuf", "sk_napi_id", "sk_wq", "sk_socket", "sk_ino", "sk_tsq_flags", "sk_timer", "sk_stamp",
		"sk_txhash", "sk_pacing_rate", "sk_gso_type", "sk_gso_max_size", "sk_gso_max_segs", "sk_route_caps", "sk_callback_lock",
	},
	"inet_sock": {"inet_saddr", "inet_sport", "inet_id", "cork", "pinet6"},
	"inet_connection_sock": {
		"icsk_bind_hash", "icsk_bind2_hash", "icsk_retransmit_timer", "icsk_delack_timer", "icsk_timeout", "icsk_rto", "icsk_pmtu_cookie",
		"icsk_retransmits", "icsk_pending", "icsk_backoff", "icsk_probes_out", "icsk_probes_tstamp", "icsk_ack", "icsk_mtup", "icsk_ca_priv",
	},
	"ipv6_pinfo": {"saddr", "daddr_cache", "saddr_cache", "dst_cookie", "rcv_flowinfo"},
	"tcp_sock": {
		"max_window", "rcv_ssthresh", "reordering", "gso_segs", "retransmit_skb_hint", "lost_skb_hint", "chrono_start", "chrono_stat",
		"snd_wnd", "mss_cache", "snd_cwnd", "prr_out", "lost_out", "sacked_out", "tsoffset", "bytes_sent", "snd_sml", "write_seq", "pushed_seq",
		"lsndtime", "mdev_us", "rttvar_us", "mdev_max_us", "rtt_seq", "tcp_wstamp_ns", "tcp_clock_cache", "tcp_mstamp", "tsorted_sent_queue",
		"highest_sack", "pred_flags", "rcv_nxt", "snd_nxt", "snd_una", "window_clamp", "srtt_us", "packets_out", "snd_up", "delivered",
		"delivered_ce", "app_limited", "rcv_wnd", "rcv_tstamp", "bytes_received", "segs_in", "data_segs_in", "rcv_wup", "max_packets_out",
		"cwnd_usage_seq", "rate_delivered", "rate_interval_us", "rcv_rtt_last_tsecr", "first_tx_mstamp", "delivered_mstamp", "bytes_acked",
		"rcv_rtt_est", "rcvq_space", "copied_seq", "snd_wl1", "rtt_min", "out_of_order_queue", "snd_ssthresh", "segs_out", "data_segs_out",
		"bytes_retrans", "dsack_dups", "compressed_ack_rcv_nxt", "duplicate_sack", "selective_acks", "tsq_node", "rack", "advmss",
		"snd_cwnd_cnt", "snd_cwnd_used", "snd_cwnd_stamp", "prior_cwnd", "prr_delivered", "last_oow_ack_time", "pacing_timer",
		"compressed_ack_timer", "ooo_last_skb", "recv_sack_cache", "prior_ssthresh", "high_seq", "retrans_stamp", "retrans_out", "lost",
		"undo_marker", "undo_retrans", "total_retrans", "rto_stamp", "total_rto", "total_rto_recoveries", "total_rto_time", "urg_seq",
		"mtu_probe", "timeout_rehash", "rcv_ooopack", "reord_seen", "plb_rehash", "scaling_ratio", "sacked_hint",
	},
	"tcp_options_received": {"ts_recent_stamp", "ts_recent", "rcv_tsval", "rcv_tsecr", "mss_clamp"},
}

// TCPSockets asks for the kernel's own picture of every socket of TCP of a network
// namespace.
type TCPSockets struct {
	*Question
	room     *ebpf.Map
	family   int // where the family is
	pictures map[uint16]picture
}

// picture is how sockets of an address family look: their size, and which parts of
// them tell of options.
type picture struct {
	size int
	kept []span
}

type span struct{ at, size int }

// Before a socket's own bytes stand the number of its inode and the flags of its
// struct socket, of which the lowest tell who waits for room (include/linux/net.h).
const (
	aheadOfSocket = 16
	waitingFlags  = 1<<0 | 1<<1 | 1<<2 // SOCKWQ_ASYNC_NOSPACE, SOCKWQ_ASYNC_WAITDATA, SOCK_NOSPACE
)

// mostOfSocket is more than the size of any socket of TCP.
const mostOfSocket = 8 << 10

// NewTCPSockets prepares the question.
func NewTCPSockets() (*TCPSockets, error) {
	if off {
		return nil, ErrOff
	}
	t := &TCPSockets{}
	var err error
	if t.room, err = ebpf.NewMap(&ebpf.MapSpec{Name: "room", Type: ebpf.Array, KeySize: 4, ValueSize: mostOfSocket, MaxEntries: 1}); err != nil {
		return nil, fmt.Errorf("make a map: %w", err)
	}
	if t.Question, err = load("tcp_sockets", "tcp", (*kernel).everyone, t.body); err != nil {
		return nil, errors.Join(err, t.room.Close())
	}
	return t, nil
}

// Close frees the program and its map.
func (t *TCPSockets) Close() error { return errors.Join(t.Question.Close(), t.room.Close()) }

// draw finds out how sockets look.
func (t *TCPSockets) draw(k *kernel) error {
	six, err := k.offset("tcp6_sock", "inet6")
	if err != nil {
		return err
	}
	received, err := k.offset("tcp_sock", "rx_opt")
	if err != nil {
		return err
	}
	var gaps []span
	for name, members := range passing {
		base := map[string]int32{"ipv6_pinfo": six, "tcp_options_received": received}[name] // all others begin where the socket does
		for _, member := range members {
			at, size, err := k.extent(name, member)
			if err == nil {
				gaps = append(gaps, span{int(base + at), int(size)})
			}
		}
	}
	slices.SortFunc(gaps, func(a, b span) int { return cmp.Compare(a.at, b.at) })
	t.pictures = map[uint16]picture{}
	for family, name := range map[uint16]string{unix.AF_INET: "tcp_sock", unix.AF_INET6: "tcp6_sock"} {
		size, err := k.sizeOf(name)
		if err != nil {
			return err
		}
		if size > mostOfSocket-aheadOfSocket {
			return fmt.Errorf("a socket of %d bytes", size)
		}
		t.pictures[family] = picture{int(size), between(gaps, int(size))}
	}
	return nil
}

// between are the parts of size bytes that lie in no gap.
func between(gaps []span, size int) (parts []span) {
	end := 0
	for _, g := range gaps {
		if g.at > end && end < size {
			parts = append(parts, span{end, min(g.at, size) - end})
		}
		end = max(end, g.at+g.size)
	}
	if end < size {
		parts = append(parts, span{end, size - end})
	}
	return parts
}

// extent is where a member of a structure lies and how large it is; one of bits has none.
func (k *kernel) extent(name, member string) (at, size int32, err error) {
	find := func(spec *btf.Spec) (btf.Member, error) {
		var s *btf.Struct
		if err := spec.TypeByName(name, &s); err != nil {
			return btf.Member{}, err
		}
		m, ok := wholeMember(s, member, 0)
		if !ok {
			return m, fmt.Errorf("structure %s of this kernel has no %s", name, member)
		}
		return m, nil
	}
	at, err = k.number(name+"."+member+" begins", func(spec *btf.Spec) (int32, error) {
		m, err := find(spec)
		return int32(m.Offset.Bytes()), err
	})
	if err != nil {
		return 0, 0, err
	}
	size, err = k.number(name+"."+member+" takes", func(spec *btf.Spec) (int32, error) {
		m, err := find(spec)
		if err != nil {
			return 0, err
		}
		n, err := btf.Sizeof(m.Type)
		return int32(n), err
	})
	return at, size, err
}

// wholeMember finds a member that is not one of bits, also in structures without a name.
func wholeMember(t btf.Type, name string, base btf.Bits) (btf.Member, bool) {
	var members []btf.Member
	switch t := btf.UnderlyingType(t).(type) {
	case *btf.Struct:
		members = t.Members
	case *btf.Union:
		members = t.Members
	}
	for _, m := range members {
		m.Offset += base
		if m.Name == name {
			return m, m.BitfieldSize == 0
		}
		if m.Name == "" {
			if found, ok := wholeMember(m.Type, name, m.Offset); ok {
				return found, true
			}
		}
	}
	return btf.Member{}, false
}

func (t *TCPSockets) body(k *kernel) (asm.Instructions, error) {
	at, err := k.offsets(map[string][]string{
		"state": {"sock_common", "skc_state"}, "family": {"sock_common", "skc_family"}, "socket": {"sock", "sk_socket"},
		"own": {"socket_alloc", "socket"}, "inode": {"socket_alloc", "vfs_inode"}, "ino": {"inode", "i_ino"}, "flags": {"socket", "flags"},
	})
	if err != nil {
		return nil, err
	}
	if err := t.draw(k); err != nil {
		return nil, err
	}
	t.family = aheadOfSocket + int(at["family"])
	const (
		timeWait    = 6  // TCP_TIME_WAIT and
		newSynRecv  = 12 // TCP_NEW_SYN_RECV, which are smaller structures
		word        = -8
		key         = -16
		socketFlags = 8
		sixth       = "IPv6"
	)
	// read reads size bytes at R3.
	read := func(to asm.Register, at, size int32) asm.Instructions {
		return asm.Instructions{
			asm.Mov.Reg(asm.R1, to), asm.Add.Imm(asm.R1, at), asm.Mov.Imm(asm.R2, size),
			asm.FnProbeReadKernel.Call(), asm.JNE.Imm(asm.R0, 0, endOfProgram),
		}
	}
	// whole puts the socket out.
	whole := func(family uint16) asm.Instructions {
		size := int32(t.pictures[family].size)
		return slices.Concat(asm.Instructions{asm.Mov.Reg(asm.R3, asm.R7)}, read(asm.R6, aheadOfSocket, size), asm.Instructions{
			asm.Mov.Reg(asm.R1, asm.R9), asm.Mov.Reg(asm.R2, asm.R6), asm.Mov.Imm(asm.R3, aheadOfSocket+size), asm.FnSeqWrite.Call(),
		})
	}
	v6 := whole(unix.AF_INET6)
	v6[0] = v6[0].WithSymbol(sixth)
	return slices.Concat(asm.Instructions{
		asm.Mov.Imm(asm.R1, 0), asm.StoreMem(asm.RFP, key, asm.R1, asm.DWord),
		asm.LoadMapPtr(asm.R1, t.room.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, key),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, endOfProgram),
		asm.Mov.Reg(asm.R6, asm.R0),
		asm.LoadMem(asm.R1, asm.R7, int16(at["state"]), asm.Byte),
		asm.JEq.Imm(asm.R1, timeWait, endOfProgram),
		asm.JEq.Imm(asm.R1, newSynRecv, endOfProgram),
		asm.Mov.Reg(asm.R3, asm.R7), asm.Add.Imm(asm.R3, at["socket"]),
	}, read(asm.RFP, word, 8), asm.Instructions{
		asm.LoadMem(asm.R3, asm.RFP, word, asm.DWord), asm.JEq.Imm(asm.R3, 0, endOfProgram), // nobody has it open
		asm.Add.Imm(asm.R3, at["inode"]-at["own"]+at["ino"]),
	}, read(asm.R6, 0, 8), asm.Instructions{
		asm.LoadMem(asm.R3, asm.RFP, word, asm.DWord), asm.Add.Imm(asm.R3, at["flags"]),
	}, read(asm.R6, socketFlags, 8), asm.Instructions{
		asm.LoadMem(asm.R1, asm.R7, int16(at["family"]), asm.Half), asm.JEq.Imm(asm.R1, unix.AF_INET6, sixth),
	}, whole(unix.AF_INET), asm.Instructions{asm.Ja.Label(endOfProgram)}, v6), nil
}

// Alike tells which sockets of TCP of the calling thread's network namespace have the
// same state and the same options: those of one number do. They are known by their
// inodes.
func (t *TCPSockets) Alike() (map[uint64]int, error) {
	f, err := t.iter.Open()
	if err != nil {
		return nil, fmt.Errorf("read sockets by BPF: %w", err)
	}
	defer f.Close()
	out, seen := map[uint64]int{}, map[string]int{}
	var key []byte
	for r := bufio.NewReaderSize(f, 64<<10); ; {
		head, err := r.Peek(t.family + 2)
		if len(head) == 0 && err == io.EOF {
			return out, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read sockets by BPF: %w", err)
		}
		family := binary.NativeEndian.Uint16(head[t.family:])
		p, ok := t.pictures[family]
		if !ok {
			return nil, fmt.Errorf("read sockets by BPF: one of family %d", family)
		}
		raw, err := r.Peek(aheadOfSocket + p.size)
		if err != nil {
			return nil, fmt.Errorf("read sockets by BPF: %w", err)
		}
		key = binary.NativeEndian.AppendUint64(key[:0], binary.NativeEndian.Uint64(raw[8:])&^waitingFlags)
		for _, s := range p.kept {
			key = append(key, raw[aheadOfSocket+s.at:][:s.size]...)
		}
		class, known := seen[string(key)]
		if !known {
			class = len(seen)
			seen[string(key)] = class
		}
		out[binary.NativeEndian.Uint64(raw)] = class
		if _, err := r.Discard(len(raw)); err != nil {
			return nil, err
		}
	}
}
