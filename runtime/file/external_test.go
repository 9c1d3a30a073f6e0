package file

import "testing"

func TestParseKey(t *testing.T) {
	for text, want := range map[string]Key{
		"fd[7:12]":                   {kind: "fd", a: 7, b: 12},
		"pipe[4711]":                 {kind: "pipe", b: 4711},
		"socket[0x10]":               {kind: "socket", b: 16},
		"file[2049:131]":             {kind: "file", a: 2049, b: 131},
		"tty[0x1a:3]":                {kind: "tty", a: 26, b: 3},
		"":                           {},
		"pipe:[4711]":                {},
		"pipe[1:2]":                  {},
		"file[2]":                    {},
		"fd[7:12]x":                  {},
		"fd[7:-1]":                   {},
		"fd[1:99999999999999999999]": {},
	} {
		got, err := ParseKey(text)
		want.text = text
		if want.kind == "" {
			if err == nil {
				t.Errorf("%q is taken for a key", text)
			}
			continue
		}
		if err != nil || got != want {
			t.Errorf("%q is %+v, %v; want %+v", text, got, err, want)
		}
	}
}
