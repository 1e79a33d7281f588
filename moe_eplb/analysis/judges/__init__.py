"""One function for each check of a verdict; each reads a loaded run folder and returns a `CheckResult`."""
