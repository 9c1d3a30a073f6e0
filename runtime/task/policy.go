package task

import (
	"bytes"
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// maxNodes is the size in bits of a mask of memory nodes, above the largest
// number of nodes of any kernel (CONFIG_NODES_SHIFT is 10 at most).
const maxNodes = 1024

// AskPolicy adds the call that reads a memory policy: the calling thread's own,
// or with an address that of the area there (get_mempolicy(2) MPOL_F_ADDR).
func AskPolicy(b *tracee.Batch, addr uint64) func() *image.MemPolicy {
	const ofAddress = 2
	var flags uint64
	if addr != 0 {
		flags = ofAddress
	}
	mode, nodes := b.Reserve(8), b.Reserve(maxNodes/8)
	got := b.Try(unix.SYS_GET_MEMPOLICY, mode, nodes, tracee.W(maxNodes), tracee.W(addr), tracee.W(flags))
	return func() *image.MemPolicy {
		p := &image.MemPolicy{
			Mode:  binary.LittleEndian.Uint32(b.At(mode, 4)),
			Nodes: bytes.TrimRight(b.At(nodes, maxNodes/8), "\x00"),
		}
		if b.Err(got) != nil || p.Mode == 0 && len(p.Nodes) == 0 {
			return nil
		}
		p.Nodes = bytes.Clone(p.Nodes)
		return p
	}
}

// PutPolicy copies a policy's nodes into a batch and returns the arguments that
// set_mempolicy(2) and mbind(2) have in common.
func PutPolicy(b *tracee.Batch, p *image.MemPolicy) (mode, nodes, size tracee.Word) {
	mask := make([]byte, maxNodes/8)
	copy(mask, p.Nodes)
	return tracee.W(p.Mode), b.Put(mask), tracee.W(maxNodes)
}

func restorePolicy(b *tracee.Batch, p *image.MemPolicy) {
	if p != nil {
		mode, nodes, size := PutPolicy(b, p)
		b.Add(unix.SYS_SET_MEMPOLICY, mode, nodes, size)
	}
}
