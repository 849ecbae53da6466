//! Where the parts of a cluster live: each in a network namespace of its own, joined by routes
//! through the harness's, so that any two can be parted; or all on loopback where the machine does
//! not allow namespaces.

use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

/// Set in the environment of a harness that runs in namespaces of its own.
const INSIDE: &str = "HEADSTART_CHAOS_NAMESPACES";
/// What a slow link still carries.
const SLOW_LINK: [&str; 7] = ["tbf", "rate", "2mbit", "burst", "32kb", "latency", "400ms"];

/// How the parts reach each other.
#[derive(Debug)]
pub struct Network {
    namespaces: bool,
    /// Links can be slowed down.
    shaping: bool,
    parts: u8,
}

/// Where one part lives.
#[derive(Clone, Debug)]
pub struct Place {
    /// Its address.
    pub ip: Ipv4Addr,
    /// Its network namespace, and the harness's end of the link into it.
    namespace: Option<(String, String)>,
}

/// Starts this program again with namespaces of its own (network, mounts, process ids), where the
/// machine allows it. What it starts and makes there ends with it, however it ends. Gives that
/// run's exit code, or `None` if this process is the one to go on.
pub fn enter() -> Option<ExitCode> {
    const UNSHARE: [&str; 6] =
        ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"];
    if std::env::var_os(INSIDE).is_some() {
        return None;
    }
    let probe = Command::new("unshare")
        .args(UNSHARE)
        .args(["ip", "rule", "add", "from", "10.0.0.1", "to", "10.0.0.2", "blackhole"])
        .stderr(Stdio::null())
        .status();
    if !probe.is_ok_and(|status| status.success()) {
        return None;
    }
    let program = std::env::current_exe().ok()?;
    let status = Command::new("unshare")
        .args(UNSHARE)
        .arg(program)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "1")
        .status()
        .ok()?;
    Some(
        status
            .code()
            .map_or(ExitCode::FAILURE, |code| ExitCode::from(u8::try_from(code).unwrap_or(1))),
    )
}

impl Network {
    /// The network of this process.
    ///
    /// # Errors
    /// When its own namespaces cannot be set up.
    pub fn new() -> io::Result<Self> {
        let namespaces = std::env::var_os(INSIDE).is_some();
        let mut shaping = false;
        if namespaces {
            // Names of namespaces are files; these are this run's alone.
            std::fs::create_dir_all("/run/netns")?;
            run("mount", &["-t", "tmpfs", "tmpfs", "/run/netns"])?;
            run("ip", &["link", "set", "lo", "up"])?;
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
            let tbf = |verb, shape: &[&str]| {
                run("tc", &[&["qdisc", verb, "dev", "lo", "root"], shape].concat())
            };
            shaping = tbf("add", &SLOW_LINK).is_ok() && tbf("del", &[]).is_ok();
        }
        Ok(Self { namespaces, shaping, parts: 0 })
    }

    /// Whether links can be cut.
    #[must_use]
    pub fn can_part(&self) -> bool {
        self.namespaces
    }

    /// Whether links can be slowed down.
    #[must_use]
    pub fn can_slow(&self) -> bool {
        self.shaping
    }

    /// A place for one more part.
    ///
    /// # Errors
    /// When its namespace cannot be made.
    pub fn place(&mut self, name: &str) -> io::Result<Place> {
        if !self.namespaces {
            return Ok(Place { ip: Ipv4Addr::LOCALHOST, namespace: None });
        }
        self.parts += 1;
        let (near, far) = ([10, 77, self.parts, 1].into(), [10, 77, self.parts, 2].into());
        let link = format!("to-{name}");
        let address = |ip: Ipv4Addr| format!("{ip}/30");
        run("ip", &["netns", "add", name])?;
        run("ip", &["link", "add", &link, "type", "veth", "peer", "name", "eth0", "netns", name])?;
        run("ip", &["addr", "add", &address(near), "dev", &link])?;
        run("ip", &["link", "set", &link, "up"])?;
        run("ip", &["-n", name, "addr", "add", &address(far), "dev", "eth0"])?;
        run("ip", &["-n", name, "link", "set", "eth0", "up"])?;
        run("ip", &["-n", name, "link", "set", "lo", "up"])?;
        run("ip", &["-n", name, "route", "add", "default", "via", &near.to_string()])?;
        Ok(Place { ip: far, namespace: Some((name.to_owned(), link)) })
    }

    /// Drops, or no longer drops, everything that `from` sends to `to`.
    ///
    /// # Errors
    /// When the rule is refused.
    pub fn cut(&self, from: &Place, to: &Place, cut: bool) -> io::Result<()> {
        let verb = if cut { "add" } else { "del" };
        let (from, to) = (from.ip.to_string(), to.ip.to_string());
        run("ip", &["rule", verb, "from", &from, "to", &to, "blackhole"])
    }

    /// Makes a part's link slow in both directions, or as fast as it was.
    ///
    /// # Errors
    /// When shaping is refused.
    pub fn slow(&self, place: &Place, slow: bool) -> io::Result<()> {
        let Some((name, link)) = &place.namespace else { return Ok(()) };
        for prefix in [&["-n", name.as_str()][..], &[]] {
            let device = if prefix.is_empty() { link.as_str() } else { "eth0" };
            let mut shape = prefix.to_vec();
            shape.extend(["qdisc", if slow { "add" } else { "del" }, "dev", device, "root"]);
            if slow {
                shape.extend(SLOW_LINK);
            }
            run("tc", &shape)?;
        }
        Ok(())
    }
}

impl Place {
    /// The command that runs `program` here.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        match &self.namespace {
            None => Command::new(program),
            Some((name, _)) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", name]).arg(program);
                command
            }
        }
    }

    /// A port that is free here: `wanted` where the part is alone.
    ///
    /// # Errors
    /// When loopback has none.
    pub fn port(&self, wanted: u16) -> io::Result<u16> {
        match self.namespace {
            Some(_) => Ok(wanted),
            None => Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port()),
        }
    }
}

fn run(program: &str, arguments: &[&str]) -> io::Result<()> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("{program} {}: {}", arguments.join(" "), said.trim())))
}
