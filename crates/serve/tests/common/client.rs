//! A small HTTP client that reads streams event by event and can leave in the middle.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// Longer than any answer of a test takes: a server that needs more hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Somebody who calls a server, with a key or without one.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    pub(crate) address: SocketAddr,
    pub(crate) key: Option<String>,
}

/// A whole answer.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

/// An answer that is still being sent; whoever drops it has left.
pub(crate) struct Stream {
    reader: BufReader<TcpStream>,
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    /// Bytes of chunks that are not a whole event yet.
    rest: Vec<u8>,
    has_ended: bool,
}

impl Client {
    pub(crate) fn with_key(&self, key: &str) -> Self {
        Self {
            address: self.address,
            key: Some(key.to_owned()),
        }
    }

    pub(crate) fn get(&self, path: &str) -> Reply {
        self.send("GET", path, b"")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Reply {
        self.send("POST", path, body.to_string().as_bytes())
    }

    pub(crate) fn send(&self, method: &str, path: &str, body: &[u8]) -> Reply {
        self.send_as(method, path, "application/json", body)
    }

    /// Sends a body of another kind than JSON.
    pub(crate) fn send_as(&self, method: &str, path: &str, kind: &str, body: &[u8]) -> Reply {
        let mut request = self.head(method, path, kind, body.len()).into_bytes();
        request.extend_from_slice(body);
        self.raw(&request)
            .unwrap_or_else(|| panic!("{method} {path} got no answer"))
    }

    /// Sends bytes as they are; none where the server closes the connection without an answer.
    pub(crate) fn raw(&self, request: &[u8]) -> Option<Reply> {
        self.exchange(request, false)
    }

    /// The same, and no more will come.
    pub(crate) fn cut(&self, request: &[u8]) -> Option<Reply> {
        self.exchange(request, true)
    }

    fn exchange(&self, request: &[u8], is_cut: bool) -> Option<Reply> {
        let mut stream = self.connect();
        // A server that has seen enough may close before it has read all.
        drop(stream.write_all(request));
        if is_cut {
            drop(stream.shutdown(Shutdown::Write));
        }
        let mut reader = BufReader::new(stream);
        let (status, headers) = read_head(&mut reader)?;
        let mut body = Vec::new();
        if is_chunked(&headers) {
            while let Some(chunk) = read_chunk(&mut reader) {
                body.extend(chunk);
            }
        } else {
            assert_in_time(reader.read_to_end(&mut body));
        }
        Some(Reply {
            status,
            headers,
            body,
        })
    }

    /// Sends a request and reads the head of its answer.
    pub(crate) fn open(&self, path: &str, body: &Value) -> Stream {
        self.open_as("POST", path, &body.to_string())
    }

    /// The same with another method.
    pub(crate) fn open_as(&self, method: &str, path: &str, body: &str) -> Stream {
        let mut stream = self.connect();
        let head = self.head(method, path, "application/json", body.len());
        stream
            .write_all((head + body).as_bytes())
            .expect("the request is sent");
        let mut reader = BufReader::new(stream);
        let (status, headers) = read_head(&mut reader).expect("a head");
        Stream {
            reader,
            status,
            headers,
            rest: Vec::new(),
            has_ended: false,
        }
    }

    /// Sends a request and leaves without reading anything.
    pub(crate) fn leave(&self, path: &str, body: &Value, after: Duration) {
        let body = body.to_string();
        let mut stream = self.connect();
        let head = self.head("POST", path, "application/json", body.len());
        stream
            .write_all((head + &body).as_bytes())
            .expect("the request is sent");
        std::thread::sleep(after);
    }

    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).expect("the server listens");
        let _ = stream.set_nodelay(true);
        let set = stream.set_read_timeout(Some(PATIENCE));
        set.and(stream.set_write_timeout(Some(PATIENCE)))
            .expect("timeouts");
        stream
    }

    fn head(&self, method: &str, path: &str, kind: &str, length: usize) -> String {
        let key = self.key.as_ref();
        let key = key.map_or(String::new(), |key| {
            format!("authorization: Bearer {key}\r\n")
        });
        format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: {kind}\r\n\
             content-length: {length}\r\n{key}\r\n"
        )
    }
}

impl Reply {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).expect("text")
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| {
            panic!("{error} in the answer {}: {}", self.status, self.text())
        })
    }

    /// The answer of a request that has to succeed.
    #[track_caller]
    pub(crate) fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text());
        self.json()
    }

    /// `error.code` of one that must not.
    #[track_caller]
    pub(crate) fn code(&self) -> String {
        let body = self.json();
        let error = &body["error"];
        assert!(self.status >= 400, "{}: {}", self.status, self.text());
        assert!(error["message"].is_string(), "{body}");
        assert!(error["type"].is_string(), "{body}");
        let code = error["code"].as_str();
        code.unwrap_or_else(|| panic!("no code in {body}"))
            .to_owned()
    }
}

impl Stream {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }

    /// The next event; none after `[DONE]` or where the stream ends.
    pub(crate) fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(at) = self.rest.windows(2).position(|two| two == b"\n\n") {
                let event: Vec<u8> = self.rest.drain(..at + 2).collect();
                let event = String::from_utf8(event).expect("events are UTF-8");
                let Some(data) = event.trim_end().strip_prefix("data: ") else {
                    continue;
                };
                if data == "[DONE]" {
                    self.has_ended = true;
                    return None;
                }
                return Some(serde_json::from_str(data).expect("events are JSON"));
            }
            if self.has_ended {
                return None;
            }
            if let Some(chunk) = read_chunk(&mut self.reader) {
                self.rest.extend(chunk);
            } else {
                assert!(self.rest.is_empty(), "the stream was cut in an event");
                return None;
            }
        }
    }

    /// All events up to `[DONE]`, which must be there.
    #[track_caller]
    pub(crate) fn all(self) -> Vec<Value> {
        let (all, has_ended) = self.rest();
        assert!(has_ended, "no [DONE] behind {:?}", all.last());
        all
    }

    /// All events, and whether `[DONE]` came behind them.
    #[track_caller]
    pub(crate) fn rest(mut self) -> (Vec<Value>, bool) {
        assert_eq!(self.status, 200);
        let all = std::iter::from_fn(|| self.next()).collect();
        (all, self.has_ended)
    }
}

fn find<'h>(headers: &'h [(String, String)], name: &str) -> Option<&'h str> {
    let found = headers.iter().find(|(known, _)| known == name);
    found.map(|(_, value)| value.as_str())
}

fn is_chunked(headers: &[(String, String)]) -> bool {
    find(headers, "transfer-encoding") == Some("chunked")
}

fn read_head(reader: &mut BufReader<TcpStream>) -> Option<(u16, Vec<(String, String)>)> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if assert_in_time(reader.read_line(&mut line)) == 0 {
            return None;
        }
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        lines.push(line.to_owned());
    }
    let status = lines.first()?.split(' ').nth(1)?.parse().ok()?;
    let headers = lines[1..].iter().filter_map(|line| {
        let (name, value) = line.split_once(':')?;
        Some((name.to_ascii_lowercase(), value.trim().to_owned()))
    });
    Some((status, headers.collect()))
}

fn read_chunk(reader: &mut BufReader<TcpStream>) -> Option<Vec<u8>> {
    let mut size = String::new();
    assert_in_time(reader.read_line(&mut size));
    let size = usize::from_str_radix(size.trim(), 16).ok()?;
    let mut chunk = vec![0; size + 2];
    reader.read_exact(&mut chunk).ok()?;
    chunk.truncate(size);
    (size > 0).then_some(chunk)
}

/// What was read; nothing where the other end has reset the connection.
#[track_caller]
fn assert_in_time(read: std::io::Result<usize>) -> usize {
    use std::io::ErrorKind;
    match read {
        Ok(count) => count,
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            panic!("the server hangs")
        }
        Err(_) => 0,
    }
}
