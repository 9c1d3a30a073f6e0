package image

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

// format returns the description of the format.
func format(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../docs/image.md")
	check(t, err)
	return string(text)
}

// TestEveryFieldDocumented compares the schema with its description: every
// structure has a section, and every field a row with its key and name.
func TestEveryFieldDocumented(t *testing.T) {
	text := format(t)
	seen := map[reflect.Type]bool{}
	for _, info := range types {
		if info.record != nil {
			documented(t, text, info.record, seen)
		}
	}
	documented(t, text, reflect.TypeFor[Pages](), seen)
	documented(t, text, reflect.TypeFor[Bytes](), seen)
	for ty, info := range types {
		if !strings.Contains(text, fmt.Sprintf("Type %d, ", ty)) {
			t.Errorf("type %d, %s, is not described", ty, info.name)
		}
	}
	for kind := range kinds {
		if !strings.Contains(text, "\n| "+kind+" | ") {
			t.Errorf("kind %s is not described", kind)
		}
	}
}

func documented(t *testing.T, text string, typ reflect.Type, seen map[reflect.Type]bool) {
	t.Helper()
	if seen[typ] {
		return
	}
	seen[typ] = true
	section := regexp.MustCompile(`(?s)\n####? ` + typ.Name() + `\n.*?(\n###|$)`).FindString(text)
	if section == "" {
		t.Errorf("%s has no section", typ.Name())
		return
	}
	for i := range typ.NumField() {
		f := typ.Field(i)
		key, _, _ := strings.Cut(f.Tag.Get("cbor"), ",")
		row := fmt.Sprintf("\n| %s | %s | ", key, f.Name)
		if !strings.Contains(section, row) {
			t.Errorf("%s has no row%q", typ.Name(), row)
		}
		if sub := structure(f.Type); sub != nil {
			documented(t, text, sub, seen)
		}
	}
}

// structure returns the structure below pointers and slices, or nil.
func structure(typ reflect.Type) reflect.Type {
	for typ.Kind() == reflect.Pointer || typ.Kind() == reflect.Slice {
		typ = typ.Elem()
	}
	if typ.Kind() == reflect.Struct {
		return typ
	}
	return nil
}

// TestWorkedExample writes the record that the description shows and compares
// the bytes.
func TestWorkedExample(t *testing.T) {
	_, rest, ok := strings.Cut(format(t), "### Example")
	_, rest, ok2 := strings.Cut(rest, "```\n")
	block, _, ok3 := strings.Cut(rest, "```")
	if !ok || !ok2 || !ok3 {
		t.Fatal("the description has no example")
	}
	var digits strings.Builder
	for line := range strings.Lines(block) {
		bytes := regexp.MustCompile(`^( *[0-9a-f]{2}\b)+`).FindString(line)
		digits.WriteString(strings.ReplaceAll(bytes, " ", ""))
	}
	want, err := hex.DecodeString(digits.String())
	check(t, err)
	f := newForge()
	f.any(t, TypePipe, 1, Pipe{Capacity: 65536, Length: 5})
	if got := f.image(); !bytes.Equal(got, want) {
		t.Errorf("% x is shown,\n% x is written", want, got)
	}
}
