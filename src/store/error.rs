//! The store's error, and the classification of the databases' errors.
//!
//! An error is permanent only if that is proven: a statement, a value or a row that no waiting makes right. Everything
//! else may be gone at the next attempt: connections, locks, resources, a shutdown, a primary that has become
//! read-only, a pooler in between, and every code that is not listed here.

use sqlx::postgres::{PgDatabaseError, PgSeverity};

/// What went wrong. No message holds SQL, a path or a client's data.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No answer now: not reachable, busy, read-only, out of connections or out of disk. Nothing was done; a retry may
    /// succeed.
    #[error("the database cannot be reached")]
    Unavailable(#[source] Cause),
    /// A commit was sent and its answer was lost or is late: it may have been done, or may still be. Nothing
    /// irreversible may happen until that is resolved: see `in_doubt.rs`.
    #[error("the outcome of the database's commit is unknown")]
    Unknown(#[source] Cause),
    /// The job is no longer this claim's: nothing was written, and nothing more may be.
    #[error("the lease was lost")]
    LeaseLost,
    /// The schema is not this program's; the text says what to do.
    #[error("{0}")]
    Schema(String),
    /// A row that this program cannot have written, or a fault of this program.
    #[error("the database holds or rejects invalid data")]
    Corrupt(#[source] Cause),
    /// The settings cannot work: the address, the user, the file; the text says why.
    #[error("{0}")]
    InvalidSettings(String),
}

/// The database's own error.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// A result of the store.
pub type Result<T> = std::result::Result<T, Error>;

/// Classifies an error of a statement or of a connection. Its transaction was not committed.
pub(super) fn classify(error: sqlx::Error) -> Error {
    match class(&error) {
        Class::Transient => Error::Unavailable(error.into()),
        Class::Permanent => Error::Corrupt(error.into()),
        Class::NoSuchTable => {
            Error::Schema("the database's schema is not this program's: run `hypnos migrate`".into())
        }
    }
}

/// Classifies an error of the first connection: some of them mean wrong settings, which later would count as
/// unavailable.
pub(super) fn classify_connect(error: sqlx::Error) -> Error {
    let line = match &error {
        sqlx::Error::Configuration(_) => "the database's address cannot be used",
        sqlx::Error::Database(answer) if is_postgres(&error) => {
            match answer.code().unwrap_or_default().as_ref() {
                "28000" | "28P01" => "the database rejects its user or password",
                "3D000" => "the database server has no database of that name",
                _ => return classify(error),
            }
        }
        sqlx::Error::Database(_) => match sqlite_code(&error).unwrap_or_default() & 0xff {
            14 => "the database file cannot be opened or created",
            26 => "the file is not a SQLite database",
            _ => return classify(error),
        },
        _ => return classify(error),
    };
    Error::InvalidSettings(line.into())
}

/// Classifies an error of a commit. The commit was sent, so only the database's own statement that it did not happen
/// proves that; every other error leaves its outcome unknown.
pub(super) fn classify_commit(error: sqlx::Error) -> Error {
    let refused = match &error {
        // A deferred constraint, a serialization conflict, a lock for notifications that was not acquired: with these
        // Postgres aborts the transaction. After FATAL it may be committed: a session that is terminated while it waits
        // for a standby has committed already. A pooler that lost the server sends ERROR too, with other codes.
        sqlx::Error::Database(answer) if is_postgres(&error) => {
            let code = answer.code().unwrap_or_default();
            is_statement_error(&error) && (matches!(code.get(..2), Some("23" | "40")) || code == "55P03")
        }
        // Busy, locked: nothing was written. Full: the commit frame is written last and is missing. A constraint is
        // checked before anything is written. An I/O error may come after everything has been written.
        sqlx::Error::Database(_) => matches!(sqlite_code(&error).unwrap_or_default() & 0xff, 5 | 6 | 13 | 19),
        _ => false,
    };
    if refused { classify(error) } else { Error::Unknown(error.into()) }
}

/// Whether a Postgres session can be used after this error: the server has rejected one statement, and not because the
/// session's prepared statements differ from what the client assumes.
pub(super) fn session_is_usable_after(error: &sqlx::Error) -> bool {
    let stale = |code: &str| matches!(code, "0A000" | "26000" | "42P05") || code.starts_with("08");
    is_statement_error(error) && postgres(error).is_some_and(|answer| !stale(answer.code()))
}

/// Whether the SQLite file is locked by another connection.
pub(super) fn is_busy(error: &sqlx::Error) -> bool {
    sqlite_code(error).is_some_and(|code| matches!(code & 0xff, 5 | 6))
}

enum Class {
    Transient,
    Permanent,
    NoSuchTable,
}

fn class(error: &sqlx::Error) -> Class {
    match error {
        sqlx::Error::Database(answer) => match answer.try_downcast_ref::<PgDatabaseError>() {
            Some(answer) => postgres_class(answer.code(), answer.routine().unwrap_or_default()),
            None => sqlite_class(sqlite_code(error).unwrap_or_default(), answer.message()),
        },
        // Faults of this program.
        sqlx::Error::Configuration(_)
        | sqlx::Error::InvalidArgument(_)
        | sqlx::Error::RowNotFound
        | sqlx::Error::TypeNotFound { .. }
        | sqlx::Error::ColumnIndexOutOfBounds { .. }
        | sqlx::Error::ColumnNotFound(_)
        | sqlx::Error::ColumnDecode { .. }
        | sqlx::Error::Encode(_)
        | sqlx::Error::Decode(_) => Class::Permanent,
        _ => Class::Transient,
    }
}

fn postgres_class(code: &str, routine: &str) -> Class {
    match code {
        "42P01" | "42703" => Class::NoSuchTable, // a table, a column
        // Another client's prepared statements on a session shared by a pooler; rights that an operator may grant
        // again.
        "42P05" | "42501" => Class::Transient,
        // A cached plan whose table has changed: another connection makes a new plan.
        "0A000" if routine == "RevalidateCachedQuery" => Class::Transient,
        // A damaged data block or index.
        "XX001" | "XX002" => Class::Permanent,
        _ => match code.get(..2) {
            // unsupported; too many rows; data; integrity; syntax and names; a view's condition
            Some("0A" | "21" | "22" | "23" | "42" | "44") => Class::Permanent,
            _ => Class::Transient,
        },
    }
}

fn sqlite_class(code: i32, message: &str) -> Class {
    match code {
        1 if message.starts_with("no such table") || message.starts_with("no such column") => {
            Class::NoSuchTable
        }
        1 => Class::Permanent, // an invalid statement; with more in its upper bits it may be retried
        // damaged, too big, constraint, type, misuse, out of range, no database
        _ if matches!(code & 0xff, 11 | 18 | 19 | 20 | 21 | 25 | 26) => Class::Permanent,
        _ => Class::Transient,
    }
}

fn is_postgres(error: &sqlx::Error) -> bool {
    postgres(error).is_some()
}

fn postgres(error: &sqlx::Error) -> Option<&PgDatabaseError> {
    error.as_database_error()?.try_downcast_ref()
}

fn is_statement_error(error: &sqlx::Error) -> bool {
    postgres(error).is_some_and(|answer| answer.severity() == PgSeverity::Error)
}

fn sqlite_code(error: &sqlx::Error) -> Option<i32> {
    error.as_database_error()?.code()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn permanent(class: &Class) -> bool {
        matches!(class, Class::Permanent)
    }

    #[test]
    fn only_what_no_waiting_mends_is_lasting() {
        let transient = [
            "08006", "08P01", "25006", "25P02", "25P03", "26000", "28P01", "3D000", "40001", "40P01",
            "42501", "42P05", "53100", "53300", "55P03", "57014", "57P01", "57P03", "57P05", "58030",
            "F0000", "P0001", "XX000", "72000", "ZZ999", "",
        ];
        for code in transient {
            assert!(matches!(postgres_class(code, ""), Class::Transient), "{code}");
        }
        for code in [
            "0A000", "21000", "22021", "22003", "23505", "23514", "42601", "42804", "44000", "XX001", "XX002",
        ] {
            assert!(permanent(&postgres_class(code, "")), "{code}");
        }
        for code in ["42P01", "42703"] {
            assert!(matches!(postgres_class(code, ""), Class::NoSuchTable), "{code}");
        }
        assert!(matches!(postgres_class("0A000", "RevalidateCachedQuery"), Class::Transient));
    }

    #[test]
    fn sqlite_is_damaged_only_when_it_says_so() {
        // busy, locked, no memory, read-only, interrupted, I/O, full, cannot open, protocol, schema changed,
        // permission, internal, retry, and unassigned codes
        for code in
            [5, 261, 517, 6, 262, 7, 8, 1032, 9, 10, 266, 522, 1034, 13, 14, 15, 17, 3, 2, 513, 769, 99]
        {
            assert!(matches!(sqlite_class(code, ""), Class::Transient), "{code}");
        }
        for code in [1, 11, 267, 523, 18, 19, 275, 787, 1555, 2067, 20, 21, 25, 26] {
            assert!(permanent(&sqlite_class(code, "near \"selec\": syntax error")), "{code}");
        }
        for message in ["no such table: job", "no such column: boot"] {
            assert!(matches!(sqlite_class(1, message), Class::NoSuchTable));
        }
    }

    #[test]
    fn a_commit_is_refused_only_by_the_databases_own_word() {
        let lost = sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into());
        assert!(matches!(classify_commit(lost), Error::Unknown(_)));
        for error in [
            sqlx::Error::Protocol("unexpected message: NotificationResponse".into()),
            sqlx::Error::WorkerCrashed,
            sqlx::Error::PoolTimedOut,
        ] {
            assert!(matches!(classify_commit(error), Error::Unknown(_)));
        }
    }
}
