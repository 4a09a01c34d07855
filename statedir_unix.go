//go:build unix

package main

import (
	"io/fs"
	"syscall"
)

// keepFilesPrivate has every file and directory that this process makes from now on be for its user alone, also where a
// library asks for more.
func keepFilesPrivate() { syscall.Umask(0o077) }

// access returns the id of the user whose file it is, and what who may do with it.
func access(info fs.FileInfo) (owner int, mode fs.FileMode) {
	return int(info.Sys().(*syscall.Stat_t).Uid), info.Mode().Perm()
}
