//! Sends one request and says what came of it: an answer, a fault that may pass, or a refusal.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use ureq::http::{HeaderMap, HeaderValue, Uri, header};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body, http::Response};

use super::answer::{self, Answer, Unusable};
use super::{Endpoint, Error, Options};

/// Longest answer that is read, in bytes: a token with twenty alternatives takes about two thousand.
const MOST: u64 = 64 << 20;
/// Longest wait that a server may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);
/// Where the key may be, in order.
const VARIABLES: [&str; 2] = ["EDGE_API_KEY", "OPENAI_API_KEY"];

/// A key, which nothing shows.
#[derive(Clone)]
pub struct Key {
    variable: &'static str,
    value: String,
    header: HeaderValue,
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the key of {}", self.variable)
    }
}

impl Key {
    /// The key in `EDGE_API_KEY`, or else in `OPENAI_API_KEY`.
    ///
    /// # Errors
    /// The variable holds what no header can: which one.
    pub fn from_environment() -> Result<Option<Self>, Error> {
        let set = |variable| {
            let value = std::env::var_os(variable)?;
            // What is not UTF-8 is refused below.
            let value = value.to_str().unwrap_or("\n").trim_matches(' ').to_owned();
            (!value.is_empty()).then_some((variable, value))
        };
        let Some((variable, value)) = VARIABLES.into_iter().find_map(set) else {
            return Ok(None);
        };
        match HeaderValue::from_str(&format!("Bearer {value}")) {
            Ok(mut header) => {
                header.set_sensitive(true);
                Ok(Some(Self { variable, value, header }))
            }
            Err(_) => Err(Error::Argument(format!(
                "{variable}: not a key: it has characters that no header can hold"
            ))),
        }
    }

    /// The variable that held it.
    pub fn variable(&self) -> &'static str {
        self.variable
    }
}

/// Why there is no answer.
#[derive(Debug)]
pub enum Failure {
    /// Every request would fare the same.
    Final(String),
    /// The server does not take this request.
    Rejected(String),
    /// There is an answer, and no training text.
    Unusable(String),
    /// The server could not be reached or had no time; it may be asked again, not before `wait`.
    Busy { message: String, wait: Option<Duration> },
    /// The server failed at this answer, and may not the next time.
    Damaged(String),
}

/// A connection to a server.
pub struct Client {
    agent: Agent,
    url: String,
    endpoint: Endpoint,
    key: Option<Key>,
    timeout: Duration,
}

impl Client {
    /// Checks the address; nothing is sent.
    ///
    /// # Errors
    /// The address is none, or holds a password; `SSL_CERT_FILE` holds no certificates.
    pub fn new(options: &Options) -> Result<Self, Error> {
        let root = options.url.trim_end_matches('/');
        let refused = |message: &str| Err(Error::Argument(format!("--url: {message}")));
        let uri = root.parse::<Uri>().unwrap_or_default();
        let Some(authority) = uri.authority().filter(|_| matches!(uri.scheme_str(), Some("http" | "https")))
        else {
            return refused("not an address that begins with http:// or https://");
        };
        if authority.as_str().contains('@') {
            return refused("a password has no place in an address; put the key into EDGE_API_KEY");
        }
        if uri.query().is_some() {
            return refused("an address without `?` is expected");
        }
        let tls = TlsConfig::builder().root_certs(certificates()?).build();
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_global(Some(options.timeout))
            .max_idle_connections(options.concurrency)
            .max_idle_connections_per_host(options.concurrency)
            .user_agent(concat!("edgec/", env!("CARGO_PKG_VERSION")))
            .tls_config(tls)
            .build();
        Ok(Self {
            agent: config.into(),
            url: format!("{root}/{}", options.endpoint.path()),
            endpoint: options.endpoint,
            key: options.key.clone(),
            timeout: options.timeout,
        })
    }

    /// Asks once.
    ///
    /// # Errors
    /// What came instead of an answer. No message has the key in it.
    pub fn ask(&self, body: &str) -> Result<Answer, Failure> {
        let mut request = self.agent.post(&self.url).header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, key.header.clone());
        }
        let mut response = request.send(body).map_err(|error| self.failed(error))?;
        let read = response.body_mut().with_config().limit(MOST).read_to_vec();
        let status = response.status().as_u16();
        match read {
            Ok(bytes) if status / 100 == 2 => {
                answer::parse(&bytes, self.endpoint).map_err(|error| match error {
                    Unusable::Damaged(message) => Failure::Damaged(message),
                    Unusable::Refused(message) => Failure::Unusable(message),
                })
            }
            Err(error) if status / 100 == 2 => Err(self.failed(error)),
            // Without a whole body the status says enough.
            read => Err(self.refused(&response, &read.unwrap_or_default())),
        }
    }

    fn refused(&self, response: &Response<Body>, body: &[u8]) -> Failure {
        let status = response.status();
        let said = self.clean(&answer::message(body).unwrap_or_else(|| "no message".into()));
        let line = format!("{}: {status}: {said}", self.url);
        match status.as_u16() {
            300..=399 => {
                let to = response.headers().get(header::LOCATION).and_then(|to| to.to_str().ok());
                let to = self.clean(to.unwrap_or("nowhere"));
                Failure::Final(format!(
                    "{}: {status} to {to}: redirects are not followed; give that as --url",
                    self.url
                ))
            }
            401 | 403 | 407 => Failure::Final(match &self.key {
                Some(key) => format!("{line} (the key was read from {})", key.variable),
                None => format!("{line} (no key: neither {} nor {} is set)", VARIABLES[0], VARIABLES[1]),
            }),
            404 | 405 => Failure::Final(format!("{line} (is --url right, with its /v1, and --model?)")),
            408 | 425 | 429 | 502..=504 => match wait(response.headers()) {
                Some(wait) if wait > LONGEST_WAIT => {
                    Failure::Final(format!("{line} (to be asked again in {} s)", wait.as_secs()))
                }
                wait => Failure::Busy { message: line, wait },
            },
            500..=599 => Failure::Damaged(line),
            _ => Failure::Rejected(line),
        }
    }

    fn failed(&self, error: ureq::Error) -> Failure {
        let busy =
            |message: String| Failure::Busy { message: format!("{}: {message}", self.url), wait: None };
        match error {
            ureq::Error::Timeout(_) => {
                busy(format!("no whole answer in {} s (--timeout)", self.timeout.as_secs_f64()))
            }
            ureq::Error::BodyExceedsLimit(_) => {
                Failure::Unusable(format!("{}: the answer is longer than {} MiB", self.url, MOST >> 20))
            }
            // How faults of certificates come out of the connection.
            ureq::Error::Io(error) if error.kind() == io::ErrorKind::InvalidData => {
                Failure::Final(format!("{}: {error}", self.url))
            }
            ureq::Error::Io(error) => busy(error.to_string()),
            ureq::Error::HostNotFound | ureq::Error::ConnectionFailed | ureq::Error::Protocol(_) => {
                busy(error.to_string())
            }
            error => Failure::Final(format!("{}: {}", self.url, self.clean(&error.to_string()))),
        }
    }

    /// What a server said, without the key, should it have repeated it.
    fn clean(&self, text: &str) -> String {
        match &self.key {
            // Shorter ones are names such as `EMPTY`, which local servers take, and ordinary words.
            Some(key) if key.value.len() >= 6 => text.replace(&key.value, "(the key)"),
            _ => text.to_owned(),
        }
    }
}

/// What a server asks to wait, as seconds or as a date (RFC 9110, section 10.2.3).
fn wait(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).ok(),
        Err(_) => {
            let date = httpdate::parse_http_date(text).ok()?;
            Some(date.duration_since(SystemTime::now()).unwrap_or_default())
        }
    }
}

/// Mozilla's roots, or those of the file that `SSL_CERT_FILE` names, as other programs read it.
fn certificates() -> Result<RootCerts, Error> {
    let Some(path) = std::env::var_os("SSL_CERT_FILE").filter(|path| !path.is_empty()) else {
        return Ok(RootCerts::WebPki);
    };
    let path = Path::new(&path);
    let bytes = fs::read(path).map_err(|source| Error::Io { path: path.into(), source })?;
    let certificates: Vec<_> = parse_pem(&bytes)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        return Err(Error::File {
            path: path.into(),
            message: "no certificate in it (SSL_CERT_FILE)".into(),
        });
    }
    Ok(RootCerts::new_with_certs(&certificates))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_ask_to_wait_in_two_forms() {
        let asked = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static(text));
            wait(&headers)
        };
        assert_eq!(asked(" 7 "), Some(Duration::from_secs(7)));
        assert_eq!(asked("Fri, 31 Dec 1999 23:59:59 GMT"), Some(Duration::ZERO));
        assert!(asked("Tue, 31 Dec 2199 23:59:59 GMT").is_some_and(|wait| wait > LONGEST_WAIT));
        for nonsense in ["-1", "soon", "inf", "NaN", "1e300"] {
            assert_eq!(asked(nonsense), None, "{nonsense}");
        }
        assert_eq!(wait(&HeaderMap::new()), None);
    }
}
