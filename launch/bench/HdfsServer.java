import java.nio.file.Files;
import java.nio.file.Path;
import org.apache.hadoop.conf.Configuration;
import org.apache.hadoop.hdfs.MiniDFSCluster;

/** One name node and one data node of HDFS on 127.0.0.1. Arguments: folder, port of the name node, port of WebHDFS. */
public class HdfsServer {
  public static void main(String[] arguments) throws Exception {
    Path folder = Path.of(arguments[0]);
    Configuration configuration = new Configuration();
    configuration.set("hdfs.minidfs.basedir", folder.resolve("data").toString());
    configuration.set("dfs.permissions.enabled", "false");
    Path ready = folder.resolve("ready");
    MiniDFSCluster cluster = new MiniDFSCluster.Builder(configuration)
        .nameNodePort(Integer.parseInt(arguments[1]))
        .nameNodeHttpPort(Integer.parseInt(arguments[2]))
        .numDataNodes(1)
        .format(!Files.exists(folder.resolve("data")))
        .build();
    cluster.waitActive();
    Files.createFile(ready);
    Thread.currentThread().join();
  }
}
