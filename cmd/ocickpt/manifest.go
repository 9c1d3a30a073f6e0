package main

import (
	"github.com/urfave/cli/v2"

	"github.com/ocickpt/ocickpt/runtime/rootfs"
)

var manifestCommand = &cli.Command{
	Name:      "manifest",
	Usage:     "describe a root directory, to tell later what has changed in it",
	ArgsUsage: "DIRECTORY",
	Description: `DIRECTORY is a container's root file system before its first start. The manifest
goes to standard output; checkpoint takes it as --rootfs-manifest. It knows a
file by its inode number and the time of its last change, which no program can
set: it is of no use for a copy of the directory. An overlay needs none.`,
	Action: func(c *cli.Context) error {
		dir, err := oneArgument(c, "a directory")
		if err != nil {
			return err
		}
		return rootfs.WriteManifest(c.App.Writer, dir)
	},
}
