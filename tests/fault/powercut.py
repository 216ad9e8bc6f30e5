"""What a power cut leaves: keeps of every file under a directory only what powercut.so saw synced.

Use: cut = PowerCut(shim, directory, log); run the process with cut.environment(); kill it; cut.apply().
The log goes on over several lives of the process: what was synced once stays synced. Renames, unlinks and overwritten blocks survive
as they are; new files whose directory was not synced are gone.
"""
import os
from pathlib import Path


class PowerCut:
    def __init__(self, shim, directory, log):
        self.shim, self.directory, self.log = Path(shim), Path(directory), Path(log)

    def environment(self):
        return {"LD_PRELOAD": str(self.shim), "SPURION_POWERCUT_LOG": str(self.log)}

    def _read_log(self):
        sizes, listings = {}, {}
        if not self.log.exists():
            return sizes, listings
        lines = iter(self.log.read_bytes().split(b"\n")[:-1])  # a record that was cut short has no newline, and did not happen
        for line in lines:
            kind, device, inode, *number = line.split(b" ")
            key = (int(device), int(inode))
            if kind == b"F":
                sizes[key] = int(number[0])
            elif kind == b"U":
                sizes.pop(key, None)
                for (other, _), listing in listings.items():
                    if other == key[0]:
                        for name in [n for n, i in listing.items() if i == key[1]]:
                            listing[name] = 0
            else:
                entries = {}
                for _ in range(int(number[0])):
                    entry = next(lines, None)
                    if entry is None:
                        return sizes, listings
                    child, name = entry.split(b" ", 1)
                    entries[name] = int(child)
                listings[key] = entries
        return sizes, listings

    def apply(self):
        """Throws away what was not synced. Gives (bytes dropped, files dropped)."""
        sizes, listings = self._read_log()
        dropped_bytes = dropped_files = 0
        for root, _, names in os.walk(self.directory):
            listing = listings.get((os.stat(root).st_dev, os.stat(root).st_ino), {})
            for name in names:
                path = os.path.join(root, name)
                st = os.lstat(path)
                if name == "LOCK" or name.startswith("LOG"):
                    continue
                if os.fsencode(name) not in listing and st.st_ino not in listing.values():
                    os.unlink(path)
                    dropped_files += 1
                    dropped_bytes += st.st_size
                    continue
                safe = min(sizes.get((st.st_dev, st.st_ino), 0), st.st_size)
                dropped_bytes += st.st_size - safe
                os.truncate(path, safe)
        # What is left is what the disk holds: an inode number that is used again must not inherit an old size.
        with open(self.log, "wb") as log:
            for root, _, names in os.walk(self.directory):
                st = os.stat(root)
                entries = [(os.lstat(os.path.join(root, n)).st_ino, n) for n in os.listdir(root)]
                log.write(b"D %d %d %d\n" % (st.st_dev, st.st_ino, len(entries)))
                for inode, name in entries:
                    log.write(b"%d %s\n" % (inode, os.fsencode(name)))
                for name in names:
                    f = os.lstat(os.path.join(root, name))
                    log.write(b"F %d %d %d\n" % (f.st_dev, f.st_ino, f.st_size))
        return dropped_bytes, dropped_files
