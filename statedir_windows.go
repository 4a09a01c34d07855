package main

import (
	"io/fs"
	"os"
)

func keepFilesPrivate() {}

// access cannot tell here: what Go makes of a file's mode says nothing about other users.
func access(fs.FileInfo) (owner int, mode fs.FileMode) { return os.Geteuid(), 0 }
