//! Sorts the databases' errors by what can be done about them.
//!
//! Permanent is only what is proven so: a statement, a value or a row that no waiting makes right. All else may be gone
//! at the next try: connections, locks, resources, a shutdown, a primary that has become read-only, a pooler between, and
//! every code that is not listed here.

use sqlx::postgres::{PgDatabaseError, PgSeverity};

use super::Error;

/// What an error of a statement or of a connection means. The transaction that it befell was not committed.
pub(super) fn fault(error: sqlx::Error) -> Error {
    match class(&error) {
        Class::Passing => Error::Away(error.into()),
        Class::Lasting => Error::Corrupt(error.into()),
        Class::NoSuchTable => {
            Error::Schema("the database's schema is not this program's: run `hypnos migrate`".into())
        }
    }
}

/// What an error of the first connection means: there are settings to mend which later would have to be waited for.
pub(super) fn refusal(error: sqlx::Error) -> Error {
    let line = match &error {
        sqlx::Error::Configuration(_) => "the database's address cannot be used",
        sqlx::Error::Database(said) if is_postgres(&error) => {
            match said.code().unwrap_or_default().as_ref() {
                "28000" | "28P01" => "the database refuses its user or password",
                "3D000" => "the database's server has no database of that name",
                _ => return fault(error),
            }
        }
        sqlx::Error::Database(_) => match sqlite_code(&error).unwrap_or_default() & 0xff {
            14 => "the database's file cannot be opened or made",
            26 => "the database's file is something else",
            _ => return fault(error),
        },
        _ => return fault(error),
    };
    Error::Bad(line.into())
}

/// What an error of a commit means. The commit was sent; so whatever is not the database's own word that it did not happen
/// says nothing about whether it did.
pub(super) fn uncommitted(error: sqlx::Error) -> Error {
    let refused = match &error {
        // A constraint that is looked at last, a conflict with others, a lock for its notifications that it did not get: an
        // ERROR that only Postgres itself can say, and with which it has aborted the transaction. After FATAL it may be done: a session that is terminated while it
        // waits for a standby has committed already. And a pooler that lost the server says ERROR too.
        sqlx::Error::Database(said) if is_postgres(&error) => {
            let code = said.code().unwrap_or_default();
            is_statement_error(&error) && (matches!(code.get(..2), Some("23" | "40")) || code == "55P03")
        }
        // Busy, locked: nothing was written. Full: the frame that says "commit" comes last, and is not there. A constraint:
        // looked at before anything is written. An I/O error may come after all has been written.
        sqlx::Error::Database(_) => matches!(sqlite_code(&error).unwrap_or_default() & 0xff, 5 | 6 | 13 | 19),
        _ => false,
    };
    if refused { fault(error) } else { Error::Unknown(error.into()) }
}

/// Whether a session of Postgres is as good as before after this error: the server has refused one statement, and not
/// because the session's prepared statements are not what the client believes.
pub(super) fn leaves_session_sound(error: &sqlx::Error) -> bool {
    let stale = |code: &str| matches!(code, "0A000" | "26000" | "42P05") || code.starts_with("08");
    is_statement_error(error) && postgres(error).is_some_and(|said| !stale(said.code()))
}

/// Whether SQLite's file is locked by another.
pub(super) fn is_busy(error: &sqlx::Error) -> bool {
    sqlite_code(error).is_some_and(|code| matches!(code & 0xff, 5 | 6))
}

enum Class {
    Passing,
    Lasting,
    NoSuchTable,
}

fn class(error: &sqlx::Error) -> Class {
    match error {
        sqlx::Error::Database(said) => match said.try_downcast_ref::<PgDatabaseError>() {
            Some(said) => postgres_class(said.code(), said.routine().unwrap_or_default()),
            None => sqlite_class(sqlite_code(error).unwrap_or_default(), said.message()),
        },
        // Faults of ours.
        sqlx::Error::Configuration(_)
        | sqlx::Error::InvalidArgument(_)
        | sqlx::Error::RowNotFound
        | sqlx::Error::TypeNotFound { .. }
        | sqlx::Error::ColumnIndexOutOfBounds { .. }
        | sqlx::Error::ColumnNotFound(_)
        | sqlx::Error::ColumnDecode { .. }
        | sqlx::Error::Encode(_)
        | sqlx::Error::Decode(_) => Class::Lasting,
        _ => Class::Passing,
    }
}

fn postgres_class(code: &str, routine: &str) -> Class {
    match code {
        "42P01" | "42703" => Class::NoSuchTable, // a table, a column
        // Somebody else's prepared statements on a session that a pooler shares; rights that an operator may give back.
        "42P05" | "42501" => Class::Passing,
        // A cached plan whose table has changed: another connection plans anew.
        "0A000" if routine == "RevalidateCachedQuery" => Class::Passing,
        // A data block or an index that is damaged.
        "XX001" | "XX002" => Class::Lasting,
        _ => match code.get(..2) {
            // what the server cannot do; too many rows; data; integrity; syntax and names; a view's condition
            Some("0A" | "21" | "22" | "23" | "42" | "44") => Class::Lasting,
            _ => Class::Passing,
        },
    }
}

fn sqlite_class(code: i32, message: &str) -> Class {
    match code {
        1 if message.starts_with("no such table") || message.starts_with("no such column") => {
            Class::NoSuchTable
        }
        1 => Class::Lasting, // a statement that cannot be; with more in its upper bits it may be tried again
        // damaged, too big, constraint, type, misuse, out of range, no database
        _ if matches!(code & 0xff, 11 | 18 | 19 | 20 | 21 | 25 | 26) => Class::Lasting,
        _ => Class::Passing,
    }
}

fn is_postgres(error: &sqlx::Error) -> bool {
    postgres(error).is_some()
}

fn postgres(error: &sqlx::Error) -> Option<&PgDatabaseError> {
    error.as_database_error()?.try_downcast_ref()
}

fn is_statement_error(error: &sqlx::Error) -> bool {
    postgres(error).is_some_and(|said| said.severity() == PgSeverity::Error)
}

fn sqlite_code(error: &sqlx::Error) -> Option<i32> {
    error.as_database_error()?.code()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lasting(class: &Class) -> bool {
        matches!(class, Class::Lasting)
    }

    #[test]
    fn only_what_no_waiting_mends_is_lasting() {
        let passing = [
            "08006", "08P01", "25006", "25P02", "25P03", "26000", "28P01", "3D000", "40001", "40P01",
            "42501", "42P05", "53100", "53300", "55P03", "57014", "57P01", "57P03", "57P05", "58030",
            "F0000", "P0001", "XX000", "72000", "ZZ999", "",
        ];
        for code in passing {
            assert!(matches!(postgres_class(code, ""), Class::Passing), "{code}");
        }
        for code in [
            "0A000", "21000", "22021", "22003", "23505", "23514", "42601", "42804", "44000", "XX001", "XX002",
        ] {
            assert!(lasting(&postgres_class(code, "")), "{code}");
        }
        for code in ["42P01", "42703"] {
            assert!(matches!(postgres_class(code, ""), Class::NoSuchTable), "{code}");
        }
        assert!(matches!(postgres_class("0A000", "RevalidateCachedQuery"), Class::Passing));
    }

    #[test]
    fn sqlite_is_damaged_only_when_it_says_so() {
        // busy and its kinds, locked, no memory, read-only, interrupted, I/O and its kinds, full, cannot open, protocol,
        // schema changed, permission, internal, retry, and numbers of tomorrow
        for code in
            [5, 261, 517, 6, 262, 7, 8, 1032, 9, 10, 266, 522, 1034, 13, 14, 15, 17, 3, 2, 513, 769, 99]
        {
            assert!(matches!(sqlite_class(code, ""), Class::Passing), "{code}");
        }
        for code in [1, 11, 267, 523, 18, 19, 275, 787, 1555, 2067, 20, 21, 25, 26] {
            assert!(lasting(&sqlite_class(code, "near \"selec\": syntax error")), "{code}");
        }
        for message in ["no such table: job", "no such column: boot"] {
            assert!(matches!(sqlite_class(1, message), Class::NoSuchTable));
        }
    }

    #[test]
    fn a_commit_is_refused_only_by_the_databases_own_word() {
        let lost = sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into());
        assert!(matches!(uncommitted(lost), Error::Unknown(_)));
        for error in [
            sqlx::Error::Protocol("unexpected message: NotificationResponse".into()),
            sqlx::Error::WorkerCrashed,
            sqlx::Error::PoolTimedOut,
        ] {
            assert!(matches!(uncommitted(error), Error::Unknown(_)));
        }
    }
}
