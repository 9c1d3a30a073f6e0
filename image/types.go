package image

import (
	"fmt"
	"reflect"
)

// section is a place in the order of a stream.
type section int

const (
	sectionNone section = iota
	sectionHeader
	sectionArch
	sectionContainer
	sectionTree
	sectionObjects
	sectionContents
	sectionTrailer
	sectionError // instead of the trailer, after any section
)

// typeInfo is what framing and order need to know of a record type.
type typeInfo struct {
	name    string
	section section
	object  bool         // the record defines its reference
	record  reflect.Type // the payload's structure, for metadata
	weight  uint64       // bytes the largest structure in an array of this record takes in memory
}

// types holds every record type; a new one is one line here and one case in
// builder.add.
var types = map[Type]typeInfo{
	TypeHeader:     {"header", sectionHeader, false, reflect.TypeFor[Header](), 0},
	TypeArch:       {"arch", sectionArch, false, reflect.TypeFor[Arch](), 0},
	TypeContainer:  {"container", sectionContainer, false, reflect.TypeFor[Container](), sizeOf[Mount]()},
	TypeTree:       {"tree", sectionTree, false, reflect.TypeFor[Tree](), sizeOf[Process]()},
	TypeTask:       {"task", sectionObjects, false, reflect.TypeFor[Task](), sizeOf[Thread]()},
	TypeNetwork:    {"network", sectionObjects, true, reflect.TypeFor[Network](), sizeOf[NetLink]()},
	TypeFile:       {"file", sectionObjects, true, reflect.TypeFor[File](), sizeOf[SocketOpt]()},
	TypeFiles:      {"files", sectionObjects, true, reflect.TypeFor[Files](), sizeOf[Descriptor]()},
	TypeFS:         {"fs", sectionObjects, true, reflect.TypeFor[FS](), 0},
	TypePipe:       {"pipe", sectionObjects, true, reflect.TypeFor[Pipe](), 0},
	TypePty:        {"pty", sectionObjects, true, reflect.TypeFor[Pty](), 0},
	TypeInode:      {"inode", sectionObjects, true, reflect.TypeFor[Inode](), sizeOf[Xattr]()},
	TypeRemoved:    {"removed", sectionObjects, true, reflect.TypeFor[Removed](), 0},
	TypeMM:         {"mm", sectionObjects, true, reflect.TypeFor[MM](), sizeOf[Area]()},
	TypeShmem:      {"shmem", sectionObjects, true, reflect.TypeFor[Shmem](), 0},
	TypeSemSet:     {"semset", sectionObjects, true, reflect.TypeFor[SemSet](), sizeOf[SemUndo]()},
	TypeMessages:   {"messages", sectionObjects, true, reflect.TypeFor[Messages](), sizeOf[Message]()},
	TypeMqueue:     {"mqueue", sectionObjects, true, reflect.TypeFor[Mqueue](), sizeOf[MqueueText]()},
	TypeSighand:    {"sighand", sectionObjects, true, reflect.TypeFor[Sighand](), sizeOf[SigAction]()},
	TypeConnection: {"connection", sectionObjects, true, reflect.TypeFor[Connection](), 0},
	TypeQueue:      {"queue", sectionObjects, true, reflect.TypeFor[Queue](), sizeOf[Unread]()},
	TypePages:      {"pages", sectionContents, false, nil, 0},
	TypeBytes:      {"bytes", sectionContents, false, nil, 0},
	TypeTrailer:    {"trailer", sectionTrailer, false, reflect.TypeFor[Trailer](), 0},
	TypeError:      {"error", sectionError, false, reflect.TypeFor[Error](), 0},
}

func sizeOf[T any]() uint64 { return uint64(reflect.TypeFor[T]().Size()) }

// String returns the type's name as messages and documentation use it.
func (t Type) String() string {
	if info, ok := types[t]; ok {
		return info.name
	}
	return fmt.Sprintf("type-%d", uint32(t))
}

// bulk reports whether records of the type carry raw bytes.
func (t Type) bulk() bool { return types[t].section == sectionContents }

// limit returns the longest payload a record of the type may have, in bytes.
func (t Type) limit() uint64 {
	switch {
	case t.bulk():
		return 4 + maxBulkHeader + PageSize + MaxRaw
	case t == TypeHeader || t == TypeTrailer || t == TypeError:
		return maxSmallMeta
	}
	return MaxRecord
}
