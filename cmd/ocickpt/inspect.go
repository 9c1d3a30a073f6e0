package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/urfave/cli/v2"

	"github.com/ocickpt/ocickpt/image"
)

// imageName is the image's file name where a directory is given.
const imageName = "checkpoint.img"

var inspectCommand = &cli.Command{
	Name:      "inspect",
	Usage:     "show what is in an image",
	ArgsUsage: "IMAGE",
	Description: `IMAGE is a file, a directory with a ` + imageName + ` in it, or - for standard
input. The whole image is read and verified. No privileges are needed.

An image that ends in the error record of a failed checkpoint is shown as far
as it goes, with the error.`,
	Flags: []cli.Flag{
		&cli.BoolFlag{Name: "json", Usage: "print JSON instead of text"},
		&cli.BoolFlag{Name: "files", Usage: "list every descriptor: whose, what, and who shares it"},
	},
	Action: func(c *cli.Context) error {
		return withImage(c, func(r io.Reader, _ string) error {
			s, err := image.Inspect(r)
			if err != nil {
				return err
			}
			write := map[[2]bool]func(io.Writer) error{
				{false, false}: s.WriteText, {false, true}: s.WriteJSON, {true, false}: s.WriteFiles, {true, true}: s.WriteFilesJSON,
			}
			return write[[2]bool{c.Bool("files"), c.Bool("json")}](c.App.Writer)
		})
	},
}

// withImage opens the image that the command's only argument names and calls
// use with it. Errors of use are given the image's name.
func withImage(c *cli.Context, use func(r io.Reader, name string) error) error {
	if c.NArg() != 1 {
		return fmt.Errorf("%s needs one argument, IMAGE or - for standard input", c.Command.Name)
	}
	r, name, err := openImage(c.Args().First(), c.App.Reader)
	if err != nil {
		return err
	}
	defer r.Close()
	if err := use(r, name); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// openImage opens the image that arg names: a file, a directory that holds
// one, or - for stdin.
func openImage(arg string, stdin io.Reader) (r io.ReadCloser, name string, err error) {
	if arg == "-" {
		return io.NopCloser(stdin), "standard input", nil
	}
	if info, err := os.Stat(arg); err == nil && info.IsDir() {
		arg = filepath.Join(arg, imageName)
	}
	f, err := os.Open(arg)
	if err != nil {
		return nil, "", err
	}
	return f, arg, nil
}
