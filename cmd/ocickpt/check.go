package main

import (
	"github.com/urfave/cli/v2"
)

var checkCommand = &cli.Command{
	Name:   "check",
	Usage:  "tell what this host can do",
	Action: func(*cli.Context) error { return nil },
}
