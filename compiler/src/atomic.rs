//! Files and folders appear whole or not at all.

use std::io::{self, BufWriter, Write};
use std::path::Path;

/// How the names of unfinished files begin.
const PREFIX: &str = ".edgec-";

/// Removes the unfinished files and folders that a killed process left in a folder.
///
/// # Errors
/// The folder cannot be read or changed.
pub fn tidy(folder: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Writes a file through a temporary one beside it, flushed to the disk and then renamed.
///
/// # Errors
/// Whatever `fill` or the file system answers; then nothing is left behind. What is there and no file, a
/// device for example, is never replaced.
pub fn write(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if std::fs::metadata(path).is_ok_and(|place| !place.is_file()) {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "something that is no file is in the way"));
    }
    let mut temporary = tempfile::Builder::new().prefix(PREFIX).tempfile_in(folder).map_err(plain)?;
    let mut writer = BufWriter::with_capacity(1 << 20, temporary.as_file_mut());
    fill(&mut writer)?;
    writer.flush()?;
    drop(writer);
    temporary.as_file().sync_all()?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        temporary.as_file().set_permissions(std::fs::Permissions::from_mode(0o644))?;
    }
    temporary.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// What the system said of a temporary file, without its name (`... at path "..."`), which nobody knows.
pub(crate) fn plain(error: io::Error) -> io::Error {
    match error.to_string().split_once(" at path ") {
        Some((said, _)) => io::Error::new(error.kind(), said),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_failure_leaves_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write(&path, |file| file.write_all(b"one")).unwrap();
        let full = |file: &mut dyn Write| {
            file.write_all(b"half of tw")?;
            Err(io::ErrorKind::StorageFull.into())
        };
        assert!(write(&path, full).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"one");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "a temporary file was left behind");
        assert!(write(folder.path(), |file| file.write_all(b"x")).is_err());
        let nowhere = write(&folder.path().join("no/file"), |_| Ok(())).unwrap_err();
        assert_eq!(nowhere.kind(), io::ErrorKind::NotFound);
        assert!(!nowhere.to_string().contains(PREFIX), "{nowhere}");

        fs::write(folder.path().join(".edgec-left"), "half").unwrap();
        tidy(folder.path()).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
