//go:build !unix

package main

// maxFiles returns how many files and connections this process may have open at once.
func maxFiles() int { return 1 << 20 }
