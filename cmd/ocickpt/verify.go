package main

import (
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	"github.com/ocickpt/ocickpt/image"
)

var verifyCommand = &cli.Command{
	Name:      "verify",
	Usage:     "check that an image is complete and undamaged",
	ArgsUsage: "IMAGE",
	Description: `IMAGE is a file, a directory with a ` + imageName + ` in it, or - for standard
input. The whole image is read; every checksum, every reference and the trailer
are checked, as restore checks them. No privileges are needed. The exit status
is 0 only for a good image.`,
	Action: func(c *cli.Context) error {
		return withImage(c, func(r io.Reader, name string) error {
			report, err := image.Verify(r)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(c.App.Writer, "%s: good: %s, id %s\n", name, report, report.ID)
			return err
		})
	},
}
